"""The learner's models and their training with DeepSpeed; the only package that imports deepspeed."""
