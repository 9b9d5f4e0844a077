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
         MetaClip2ForImageClassification
         SiglipForImageClassification
         ViTForImageClassification
        ViTMSNForImageClassification YolosForObjectDetection
         CLIPVisionModel
        SiglipVisionModel ChineseCLIPVisionModel MLCDVisionModel
        PixtralVisionModel Dinov2Model DINOv3ViTModel ViTMAEModel
        PixioModel Sapiens2Model Tipsv2VisionModel VitDetModel

    """,
        image,
    ),
    *plain(
        """
        AltCLIPModel BlipModel ChineseCLIPModel CLIPModel
        CLIPSegModel MetaClip2Model SiglipModel Tipsv2Model
    """,
        image_and_text,
    ),
    *plain("""
        ImageGPTForImageClassification ShieldGemma2ForImageClassification
        Siglip2ForImageClassification RfDetrForObjectDetection
        Data2VecVisionForSemanticSegmentation CLIPTextModel
        Siglip2VisionModel VideoMAEModel
        VivitModel Tipsv2TextModel
        TimesFm2_5Model VisionTextDualEncoderModel
        Owlv2Model OwlViTModel
        Blip2ForImageTextRetrieval Siglip2Model
    """),
)
