from teq.transforms.awq.settings import Awq

__all__ = ["Awq"]
