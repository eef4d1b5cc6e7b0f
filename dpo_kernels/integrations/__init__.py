"""Existing trainers with the fused head: TRL, transformers' Trainer, Lightning, plain loops.

Nothing is imported here: each module asks for its own framework when it is imported, and says what
to install when it is absent.
"""
