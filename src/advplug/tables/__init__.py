"""Text tables, and those that need more than `advplug.table`: of plans, of transfer, as papers print them."""
