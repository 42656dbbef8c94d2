"""The words of taskoffer: resource types, reasons and the contract with the trainer.

Layer 0 of the operator. It imports the standard library and pydantic, nothing else.
"""
