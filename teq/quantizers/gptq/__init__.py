from teq.quantizers.gptq.settings import Gptq

__all__ = ["Gptq"]
