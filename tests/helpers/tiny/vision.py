"""Models of images alone, and of images beside text, in tiny."""

from __future__ import annotations

from helpers.tiny.build import by_name, plain
from helpers.tiny.inputs import image, image_and_text

CASES = by_name(
    *plain(
        """
        BeitForImageClassification CLIPForImageClassification
        Data2VecVisionForImageClassification DeiTForImageClassification
        DeiTForImageClassificationWithTeacher Dinov2ForImageClassification
        Dinov2WithRegistersForImageClassification IJepaForImageClassification
        ImageGPTForImageClassification MetaClip2ForImageClassification
        ShieldGemma2ForImageClassification SiglipForImageClassification
        Siglip2ForImageClassification ViTForImageClassification
        ViTMSNForImageClassification RfDetrForObjectDetection YolosForObjectDetection
        Data2VecVisionForSemanticSegmentation CLIPVisionModel CLIPTextModel
        SiglipVisionModel Siglip2VisionModel ChineseCLIPVisionModel MLCDVisionModel
        PixtralVisionModel Dinov2Model DINOv3ViTModel ViTMAEModel VideoMAEModel VivitModel
        PixioModel Sapiens2Model Tipsv2VisionModel Tipsv2TextModel VitDetModel
        TimesFm2_5Model VisionTextDualEncoderModel Owlv2Model OwlViTModel
    """,
        image,
    ),
    *plain(
        """
        AltCLIPModel BlipModel Blip2ForImageTextRetrieval ChineseCLIPModel CLIPModel
        CLIPSegModel MetaClip2Model SiglipModel Siglip2Model Tipsv2Model
    """,
        image_and_text,
    ),
)
