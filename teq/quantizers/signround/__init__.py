from teq.quantizers.signround.settings import SignRound

__all__ = ["SignRound"]
