"""Low-rank adapters for ssh-deploy: LoRA (rsLoRA, DoRA), LoRTA, IntLoRA, LoHa, LoKr and VeRA, from folders."""
