"""What an adapter does to one weight; deltas know no files."""
