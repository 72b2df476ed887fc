"""Teach: students, losses and the trainer of distillation."""
