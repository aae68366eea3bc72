from teq.finetune.settings import Finetune

__all__ = ["Finetune"]
