"""llama.cpp itself, as the wheel `cyllama` has it compiled: what GGUF files are checked against."""

import cyllama.llama.llama_cpp as native
import numpy as np

native.disable_logging()


class Model(native.LlamaModel):
    """A model that tells its number of tokens, which the contexts of cyllama 0.2.18 ask for and it does not."""

    @property
    def n_vocab(self):
        return self.get_vocab().n_vocab


class LlamaCpp:
    """A model of an export's directory, with its pictures.

    Args:
        model: the file of the language model.
        mmproj: the file of the tower.
        threads: to compute with.
        context: most tokens of a conversation.
    """

    def __init__(self, model, mmproj=None, *, threads=1, context=1024):
        self.model = Model(str(model))
        self.words = self.model.get_vocab()
        params = native.LlamaContextParams()
        params.n_ctx, params.n_batch, params.n_ubatch = context, context, context
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 0
        self.context = native.LlamaContext(self.model, params)
        self.eyes = None
        if mmproj is not None:
            seeing = native.MtmdContextParams(use_gpu=False, n_threads=threads, warmup=False)
            self.eyes = native.MtmdContext(str(mmproj), self.model, seeing)

    def tokens(self, text):
        """Numbers of a text's tokens."""
        return self.words.tokenize(text, False, True)

    def read(self, prompt, picture=None):
        """Take in a prompt, with a picture in the place of `<picture>`; how many positions it takes."""
        self.context.kv_cache_clear()
        if picture is None:
            ids = self.tokens(prompt)
            self.context.decode(native.llama_batch_get_one(ids, 0))
            return len(ids)
        text = prompt.replace("<picture>", native.get_default_media_marker())
        bitmap = native.MtmdBitmap.create_image(*picture.size, picture.convert("RGB").tobytes())
        chunks = self.eyes.tokenize(text, [bitmap], False, True)
        return self.eyes.eval_chunks(self.context, chunks, 0, 0, 1024, True)

    def logits(self):
        """Of what comes next: [vocabulary]."""
        return np.array(self.context.get_logits_ith(-1))

    def answer(self, prompt, picture=None, *, most=32):
        """The most likely token, time after time, until one that ends an answer."""
        place, said = self.read(prompt, picture), []
        for _ in range(most):
            token = int(self.logits().argmax())
            if self.words.is_eog(token):
                break
            said.append(token)
            self.context.decode(native.llama_batch_get_one([token], place))
            place += 1
        return said
