"""Low-rank adapters for ssh-deploy: LoRA (rsLoRA, DoRA), LoHa, LoKr and VeRA, read from PEFT folders."""
