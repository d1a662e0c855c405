"""What others wrote and we may run: foreign implementations, which compete with our kernels for every problem.

Each computes plain attention, of inputs with the factors put beside q and k (:mod:`.joining`). :mod:`.rules` says
which there are and what each cannot do, :mod:`.identity` who they are here, and :class:`.foreign.Foreign` runs one.
Nothing in here imports a foreign package before it runs.
"""
