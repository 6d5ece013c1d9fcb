"""Reading records from packs."""
