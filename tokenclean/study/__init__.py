"""Many runs of the loop, and the tables and figures made of them."""
