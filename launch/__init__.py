"""How a run starts and is looked at: the command line, Hydra, local ranks, torchrun and Slurm."""
