"""What the runtime asks of the parts of a plan, and what it shows them: base classes, and the data that passes.

A prefill part (:mod:`.prefill`) reduces image tokens at stages (:mod:`.stages`); a sparse one (:mod:`.sparse`) lets
only some tokens attend; a cache part (:mod:`.cache`) evicts; a precision part (:mod:`.precision`) says in how many
bits the cache is stored. Method files import all of it from :mod:`lightvlm.methods.base`.
"""
