"""The page of ``flashbias report``: rows become plain data in ``keys`` and ``standing``, ``page`` puts them into the template."""
