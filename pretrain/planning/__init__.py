"""`epochal plan`: what a run would cost, before it runs."""
