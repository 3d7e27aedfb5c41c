"""Voice conversion and infilling of held-out recordings, judged by a recogniser.

    python benchmarks/voice_conversion.py runs/speech/fsdd --noise 0.5 1 2 --out conversion.json

The recogniser of ``gendiff evaluate`` has heard half of the held-out recordings; the others are
edited here, as ``gendiff edit`` does it, and their text is known from the corpus.

*Conversion* (``--noise N --cond speaker=…``): each recording goes to ``--targets`` other speakers.
Printed for each amount of noise, sigma / alpha: the share in which the recording's text is heard,
the share in which the target speaker is, and the root-mean-square distance to the recording in
the data's standard deviations. The first row, no noise, is the recordings themselves: the ceiling
of the text and the floor of the speaker. The last row sets out from noise alone, so nothing of
the recording is left but its length: what the model says of itself. "hidden" takes the text's
tokens away from the network's condition where that is told as well: see ``--wrong``.

*Wrong text* (``--wrong``): the same, with the next word of the vocabulary told in the place of
the recording's. The share in which the recording's own text is still heard says how much of it
comes from the recording, and not from being told.

*Infilling* (``--keep 0-a,b-``): the middle third of each recording is made anew, by the same
speaker. Beside it the recordings themselves, and with their middle third at the data's mean.
"""
