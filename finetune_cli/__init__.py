"""finetune: a YAML recipe is checked, resolved into a plan, and the plan is run."""

__version__ = "0.1.0"
