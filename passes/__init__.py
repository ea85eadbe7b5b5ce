"""Graph in, graph out: every transformation is one frozen dataclass with one ``apply``.

``analysis`` says what is true of a graph; each other module here changes one thing. No pass imports
another: they meet in the dialect (:mod:`autodist.runtime.dialect`) and in the contracts they declare.
"""
