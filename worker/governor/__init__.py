"""When and how much this machine may compute, and why it does not.

reasons, preferences, readings and schedule say what is known; ladder decides, purely; sensors look at the machine;
governor joins them in a running worker. What a sensor cannot tell is unknown, and unknown never pauses.
"""
