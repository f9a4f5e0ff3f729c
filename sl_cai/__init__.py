"""SL-CAI: critique and revision by principles, then supervised fine-tuning on the revisions."""
