"""How the update of a layer is parametrised: one PEFT-compatible tuner per file."""

from peft import LoHaConfig, LoHaModel, LoKrConfig, LoKrModel, LoraConfig, LoraModel

from cmlora.adapters.tuners.allora import AlloraConfig, AlloraLayer
from cmlora.adapters.tuners.block_lora import BlockLoraConfig, BlockLoraLayer
from cmlora.adapters.tuners.boft import BoftConfig, BoftLayer
from cmlora.adapters.tuners.dylora import DyloraConfig, DyloraLayer
from cmlora.adapters.tuners.hydra import HydraConfig, HydraLayer
from cmlora.adapters.tuners.ia3 import Ia3Config, Ia3Layer
from cmlora.adapters.tuners.loldu import LolduConfig, LolduLayer
from cmlora.adapters.tuners.lora_sb import LoraSbConfig, LoraSbLayer
from cmlora.adapters.tuners.lora_xs import LoraXsConfig, LoraXsLayer
from cmlora.adapters.tuners.lost import LostConfig, LostLayer
from cmlora.adapters.tuners.maestro import MaestroConfig, MaestroLayer
from cmlora.adapters.tuners.miss import MissConfig, MissLayer
from cmlora.adapters.tuners.nola import NolaConfig, NolaLayer
from cmlora.adapters.tuners.oft import OftConfig, OftLayer
from cmlora.adapters.tuners.orthogonal import OrthogonalConfig, OrthogonalLayer
from cmlora.adapters.tuners.pissa import PissaConfig, PissaLayer
from cmlora.adapters.tuners.plugin import Tuner, plug
from cmlora.adapters.tuners.randlora import RandloraConfig, RandloraLayer
from cmlora.adapters.tuners.s2ft import S2ftConfig, S2ftLayer
from cmlora.adapters.tuners.sltrain import SltrainConfig, SltrainLayer
from cmlora.adapters.tuners.snell import SnellConfig, SnellLayer
from cmlora.adapters.tuners.snella import SnellaConfig, SnellaLayer
from cmlora.adapters.tuners.svfit import SvfitConfig, SvfitLayer
from cmlora.adapters.tuners.vera import VeraConfig, VeraLayer
from cmlora.registry import Entry, Registry

TUNERS: Registry[Tuner] = Registry(
    "tuner",
    Entry(
        "nola",
        plug(NolaConfig, NolaLayer),
        "both factors are mixtures of random matrices; the mixture is trained",
        "arXiv:2310.02556",
    ),
    Entry(
        "randlora",
        plug(RandloraConfig, RandloraLayer),
        "a full-rank sum of scaled random low-rank products",
        "arXiv:2502.00987",
    ),
    Entry(
        "vera",
        plug(VeraConfig, VeraLayer),
        "shared random factors with two trained vectors per layer",
        "arXiv:2310.11454",
    ),
    Entry(
        "lora_xs",
        plug(LoraXsConfig, LoraXsLayer),
        "a small trained matrix between singular vectors of the weight",
        "arXiv:2405.17604",
    ),
    Entry(
        "lora_sb",
        plug(LoraSbConfig, LoraSbLayer),
        "a small trained matrix between factors of the first full update",
        "arXiv:2411.19557",
    ),
    Entry(
        "pissa",
        plug(PissaConfig, PissaLayer),
        "a LoRA that starts as the leading part of the weight",
        "arXiv:2404.02948",
    ),
    Entry(
        "loldu",
        plug(LolduConfig, LolduLayer),
        "the diagonal between triangular factors of the weight",
        "arXiv:2410.13618",
    ),
    Entry(
        "svfit",
        plug(SvfitConfig, SvfitLayer),
        "the leading singular values of the weight",
        "arXiv:2409.05926",
    ),
    Entry(
        "hydra",
        plug(HydraConfig, HydraLayer),
        "a parallel low-rank branch and one on the layer's own output",
        "arXiv:2309.06922",
    ),
    Entry(
        "block_lora",
        plug(BlockLoraConfig, BlockLoraLayer),
        "a LoRA whose blocks share one down factor",
        "arXiv:2501.16720",
    ),
    Entry(
        "snell",
        plug(SnellConfig, SnellLayer),
        "a sparse update of full rank from distances between small vectors",
        "arXiv:2411.01800",
    ),
    Entry(
        "snella",
        plug(SnellaConfig, SnellaLayer),
        "SNELL with a mixed kernel and a budget shared among the layers",
        "arXiv:2510.24037",
    ),
    Entry(
        "s2ft",
        plug(S2ftConfig, S2ftLayer),
        "a few rows or columns of the weight",
        "arXiv:2412.06289",
    ),
    Entry(
        "dylora",
        plug(DyloraConfig, DyloraLayer),
        "a LoRA that works at every rank up to its own",
        "arXiv:2210.07558",
    ),
    Entry(
        "maestro",
        plug(MaestroConfig, MaestroLayer),
        "low-rank factors with ranks in the order of their importance",
        "arXiv:2308.14929",
    ),
    Entry(
        "allora",
        plug(AlloraConfig, AlloraLayer),
        "a LoRA whose rows learn at paces of their own",
        "arXiv:2410.09692",
    ),
    Entry(
        "orthogonal",
        plug(OrthogonalConfig, OrthogonalLayer),
        "a LoRA in directions that no other concept uses",
        "arXiv:2312.02432",
    ),
    Entry(
        "sltrain",
        plug(SltrainConfig, SltrainLayer),
        "a low-rank update and a sparse one",
        "arXiv:2406.02214",
    ),
    Entry(
        "lost",
        plug(LostConfig, LostLayer),
        "the leading part of the weight and the columns it misses",
        "arXiv:2508.02668",
    ),
    Entry(
        "oft",
        plug(OftConfig, OftLayer),
        "rotations of the inputs in blocks",
        "arXiv:2306.07280",
    ),
    Entry(
        "boft",
        plug(BoftConfig, BoftLayer),
        "rotations of the inputs in butterfly order",
        "arXiv:2311.06243",
    ),
    Entry(
        "miss",
        plug(MissConfig, MissLayer),
        "one small matrix repeated over shards of the weight; once Bone",
        "arXiv:2409.15371",
    ),
    Entry(
        "ia3",
        plug(Ia3Config, Ia3Layer),
        "outputs or inputs rescaled one by one",
        "arXiv:2205.05638",
    ),
    Entry(
        "lora",
        Tuner(LoraConfig, LoraModel),
        "PEFT's LoRA, the ordinary low-rank update",
        "arXiv:2106.09685",
    ),
    Entry(
        "rslora",
        Tuner(LoraConfig, LoraModel, {"use_rslora": True}),
        "LoRA with the strength alpha / sqrt(r), by PEFT",
        "arXiv:2312.03732",
    ),
    Entry(
        "dora",
        Tuner(LoraConfig, LoraModel, {"use_dora": True}),
        "LoRA with trained row norms, by PEFT; weight 0 keeps the norms",
        "arXiv:2402.09353",
    ),
    Entry(
        "loha",
        Tuner(LoHaConfig, LoHaModel),
        "PEFT's product of two low-rank updates, entry by entry",
        "arXiv:2108.06098",
    ),
    Entry(
        "lokr",
        Tuner(LoKrConfig, LoKrModel),
        "PEFT's Kronecker product of a small and a low-rank matrix",
        "arXiv:2309.14859",
    ),
)
