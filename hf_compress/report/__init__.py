"""What runs found, in tables, figures and pages; and what checkpoints hold."""
