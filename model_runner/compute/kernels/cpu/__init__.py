"""C++ kernels for this CPU: functions/ holds the sources, compilation/ builds them, kernels.py loads them."""
