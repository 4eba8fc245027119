from __future__ import annotations

import asyncio

import pytest
from llm.embedding import embed

from llm.sampling import SamplingParams
from serve.backend import Overloaded, Unavailable
from serve.embedder import Embedder
from serve.replica import Replica
from tests.models import tiny_model
from tests.serve.test_replica import new_engine

PROMPTS = [[60, 61, 62], [90, 91], [70] * 30]


def test_vectors_are_the_models():
    async def main() -> None:
        served = Embedder(tiny_model, max_requests=2)
        info = await served.describe()
        assert (info.generates, info.embeds, info.context) == (False, True, 256)
        vectors = await served.embed(PROMPTS)
        for vector, own in zip(vectors, embed(tiny_model(), PROMPTS), strict=True):
            assert vector == pytest.approx(own.tolist(), abs=1e-5)
        for prompt in ([], [320], [60] * 257):
            with pytest.raises(ValueError, match="prompt"):
                await served.embed([prompt])
        with pytest.raises(ValueError, match="can't continue"):
            await anext(served.tokens([(PROMPTS[0], SamplingParams())]))
        many = await asyncio.gather(*(served.embed(PROMPTS) for _ in range(3)), return_exceptions=True)
        assert [type(one) for one in many] == [list, list, Overloaded]
        assert served.load().queued_tokens == 0

    asyncio.run(main())


def test_without_a_model_it_is_unavailable():
    def broken():
        raise OSError("no disk")

    async def main() -> None:
        served = Embedder(broken, max_requests=2)
        with pytest.raises(Unavailable, match="OSError: no disk"):
            await served.describe()
        await served.failed()

    asyncio.run(main())


def test_vectors_of_a_generating_model_come_beside_its_tokens():
    async def main() -> None:
        engine = new_engine()
        engine.end_ids = frozenset()
        served = Replica(lambda: engine)
        await served.describe()
        tokens = served.tokens([([60, 61], SamplingParams(max_new_tokens=100))])
        await anext(tokens)
        assert (await served.embed(PROMPTS))[1] == pytest.approx(embed(engine.model, PROMPTS)[1].tolist(), abs=1e-5)
        assert len([token async for token in tokens]) == 99

    asyncio.run(main())
