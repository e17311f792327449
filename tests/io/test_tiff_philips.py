"""What the XML of a Philips TIFF says: the slide's spacing, not that of its label or levels, and never a crash."""

from __future__ import annotations

from pekasc.io._tiff_philips import philips_spacing

SPACING = '<Attribute Name="DICOM_PIXEL_SPACING">{}</Attribute>'
TYPE = '<Attribute Name="PIM_DP_IMAGE_TYPE">{}</Attribute>'


def test_the_slides_own_spacing_comes_first_else_that_of_its_finest_level() -> None:
    levels = f"<Array>{''.join(f'<DataObject>{SPACING.format(s)}</DataObject>' for s in ('2 1', '4 2'))}</Array>"
    label = f"<DataObject>{TYPE.format('LABELIMAGE')}{SPACING.format('9 9')}</DataObject>"
    slide = f"<DataObject>{TYPE.format('WSI')}{{}}<Attribute>{levels}</Attribute></DataObject>"
    both = f"<DataObject>{label}{slide}</DataObject>"
    assert philips_spacing(both.format(SPACING.format('"3" "5"'))) == ["5", "3"]
    assert philips_spacing(both.format("")) == ["1", "2"]
    assert philips_spacing(f"<DataObject>{label}</DataObject>") is None


def test_other_or_damaged_text_says_nothing() -> None:
    assert philips_spacing("Aperio|MPP = 0.25") is None
    assert philips_spacing("<DataObject>") is None
    assert philips_spacing("<DataObject> DICOM_PIXEL_SPACING") == []
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    text = f'<!DOCTYPE x [<!ENTITY l0 "ha">{laughs}]><DataObject>DICOM_PIXEL_SPACING &l9;</DataObject>'
    assert philips_spacing(text) == []
