from teq.transforms.teq.settings import Teq

__all__ = ["Teq"]
