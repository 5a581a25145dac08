"""Speaker identification modules for SpeechBrain recipes.

``spkid`` knows nothing of any one data set: encoders, poolings and margin
heads, and the parts of a recipe that are worth reusing.
"""

__version__ = "0.1.0"
