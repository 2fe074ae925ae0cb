"""Every other PEFT method with a change of weights, for ssh-deploy: read and merged through PEFT's own layers."""
