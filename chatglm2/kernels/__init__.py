"""Faster products with quantized weights, a file each; `quantization.BACKENDS` lists them.

Nothing else needs this folder: without it, the layers compute in plain torch.
"""
