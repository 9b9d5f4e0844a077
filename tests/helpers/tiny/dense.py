"""Dense models that write text, in tiny."""

from __future__ import annotations

from helpers.tiny.build import DROP, Case, by_name, plain
from helpers.tiny.inputs import text

CASES = by_name(
    *plain(
        """
        MptForCausalLM GPTBigCodeForCausalLM PersimmonForCausalLM Cohere2ForCausalLM
        Exaone4ForCausalLM Olmo3ForCausalLM ArceeForCausalLM SeedOssForCausalLM
        ApertusForCausalLM Ernie4_5ForCausalLM VaultGemmaForCausalLM DogeForCausalLM
        DiffLlamaForCausalLM Ministral3ForCausalLM BioGptForCausalLM XGLMForCausalLM
        ModernBertDecoderForCausalLM BitNetForCausalLM GlmForCausalLM NanoChatForCausalLM
         JinaEmbeddingsV3Model Apertus1p5TextForCausalLM BartForCausalLM
        BertLMHeadModel BertGenerationDecoder BigBirdForCausalLM BigBirdPegasusForCausalLM
        BlenderbotForCausalLM BlenderbotSmallForCausalLM BloomForCausalLM
        CamembertForCausalLM CohereForCausalLM CwmForCausalLM Data2VecTextForCausalLM
        DoryForCausalLM ElectraForCausalLM Emu3ForCausalLM ErnieForCausalLM
        LlamaForCausalLM FalconForCausalLM GemmaForCausalLM Gemma2ForCausalLM
        Gemma3ForCausalLM Gemma4UnifiedForCausalLM Glm4ForCausalLM GPT2LMHeadModel
        GPTNeoXForCausalLM GPTNeoXJapaneseForCausalLM GptOssForCausalLM
        GraniteForCausalLM GraniteSWAForCausalLM HeliumForCausalLM HrmTextForCausalLM
        HyperCLOVAXForCausalLM Jais2ForCausalLM MarianForCausalLM
        MBartForCausalLM MegatronBertForCausalLM MiniMaxM3VLForCausalLM MistralForCausalLM
        MllamaForCausalLM MvpForCausalLM OlmoForCausalLM Olmo2ForCausalLM
        OpenAIGPTLMHeadModel OPTForCausalLM PegasusForCausalLM PhiForCausalLM
        Phi3ForCausalLM PLBartForCausalLM ProphetNetForCausalLM Qwen2ForCausalLM
        Qwen3ForCausalLM RemBertForCausalLM RobertaForCausalLM
        RobertaPreLayerNormForCausalLM RoFormerForCausalLM SmolLM3ForCausalLM
        StableLmForCausalLM Starcoder2ForCausalLM TrOCRForCausalLM WhisperForCausalLM
        XLMRobertaForCausalLM XLMRobertaXLForCausalLM XLNetLMHeadModel
    """,
        text,
    ),
    Case(
        "GPTNeoForCausalLM",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
        inputs=text,
    ),
    Case("HunYuanDenseV1ForCausalLM", {"head_dim": 8}, inputs=text),
    Case("LlamaForCausalLM", inputs=text, name="Exaone", config_class="ExaoneConfig"),
    Case("MiniCPM3ForCausalLM", {"dim_model_base": 16}, inputs=text),
    Case("CodeGenForCausalLM", {"rotary_dim": 4}, inputs=text),
    Case(
        "Gemma4ForCausalLM",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "per_layer_config": {},
            "num_kv_shared_layers": 0,
        },
        inputs=text,
    ),
    Case("YoutuForCausalLM", {"head_dim": DROP}, inputs=text),
    Case("Lfm3ForCausalLM", {"layer_types": ["conv", "full_attention"]}, inputs=text),
    *plain("""
        GPTJForCausalLM XmodForCausalLM
    """),
)
