//! `preprocessor_config.json`, or the `image_processor` section of the newer
//! `processor_config.json`: how a picture becomes the input of a network, as transformers' image
//! processors do it.

use serde_json::Value;

use crate::config::ConfigFile;
use crate::layers::Filter;
use crate::picture::Picture;
use crate::{ModelFolder, Result};

const OLD: &str = "preprocessor_config.json";
const NEW: &str = "processor_config.json";

/// Fields that name things, or that say how a picture becomes RGB bytes in memory, which is not
/// done here.
const HARMLESS: [&str; 11] = [
    "data_format",
    "default_to_square",
    "device",
    "disable_grouping",
    "do_convert_rgb",
    "input_data_format",
    "pad_size",
    "processor_class",
    "return_tensors",
    "use_fast",
    "valid_kwargs",
];

/// An image processor class of transformers, without its ending `Fast` or `Pil`, and its defaults.
struct Class {
    name: &'static str,
    filter: Filter,
    /// A single number as `size` is the shorter side, not both.
    keeps_shape: bool,
    crops: bool,
}

const CLASSES: [Class; 11] = {
    const fn class(name: &'static str, filter: Filter, keeps_shape: bool, crops: bool) -> Class {
        Class { name, filter, keeps_shape, crops }
    }
    const BILINEAR: Filter = Filter::BilinearAntialias;
    const BICUBIC: Filter = Filter::BicubicAntialias;
    [
        class("ViTImageProcessor", BILINEAR, false, false),
        class("ViTFeatureExtractor", BILINEAR, false, false),
        class("CLIPImageProcessor", BICUBIC, true, true),
        class("CLIPFeatureExtractor", BICUBIC, true, true),
        class("SiglipImageProcessor", BICUBIC, false, false),
        class("BitImageProcessor", BICUBIC, true, true),
        class("DeiTImageProcessor", BICUBIC, false, true),
        class("DeiTFeatureExtractor", BICUBIC, false, true),
        class("BeitImageProcessor", BICUBIC, false, false),
        class("MobileNetV1ImageProcessor", BILINEAR, true, true),
        class("MobileNetV2ImageProcessor", BILINEAR, true, true),
    ]
};

/// What `size` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    /// Height and width, whatever the picture's shape.
    Exact([usize; 2]),
    /// The shorter side; the longer one follows.
    Shorter(usize),
}

/// What a processor's file says; fields that are not there have the defaults of its class.
#[derive(Debug, Clone)]
pub(crate) struct Processor {
    /// The size to which pictures are resized; `None` where the file does not say.
    pub(crate) size: Option<Size>,
    /// Whether they are resized at all.
    pub(crate) resizes: bool,
    /// Height and width of the middle part that is taken.
    pub(crate) crop: Option<[usize; 2]>,
    /// Whether that part is taken.
    pub(crate) crops: bool,
    /// The filter.
    pub(crate) filter: Filter,
    /// Mean of red, green and blue in 0..1, where the file says.
    pub(crate) mean: Option<[f32; 3]>,
    /// Standard deviation, likewise.
    pub(crate) std: Option<[f32; 3]>,
    /// The file, for errors.
    pub(crate) fields: ConfigFile,
}

impl Processor {
    /// Reads the file of the model in `folder`; `absent` is the filter where neither the file nor a
    /// class names one, and `harmless` are further fields that change nothing for the caller.
    pub(crate) fn read(folder: &ModelFolder, absent: Filter, harmless: &[&str]) -> Result<Self> {
        let fields = if !folder.has(OLD) && folder.has(NEW) {
            folder.config(NEW)?.section("image_processor", &[])?
        } else {
            folder.config(OLD)?
        };
        let class = class(&fields)?;
        let keeps_shape = class.is_some_and(|class| class.keeps_shape);
        let normalizes = fields.flag("do_normalize", true)?;
        let plain = |value: f32| (!normalizes).then_some([value; 3]);
        let processor = Self {
            size: size(&fields, "size", keeps_shape)?,
            resizes: fields.flag("do_resize", true)?,
            crop: match size(&fields, "crop_size", false)? {
                Some(Size::Exact(sides)) => Some(sides),
                Some(Size::Shorter(_)) => {
                    return Err(fields.unsupported("crop_size", "height and width"));
                }
                None => None,
            },
            crops: fields.flag("do_center_crop", class.is_some_and(|class| class.crops))?,
            filter: filter(&fields)?.unwrap_or(class.map_or(absent, |class| class.filter)),
            mean: plain(0.0).or(triple(&fields, "image_mean")?),
            std: plain(1.0).or(triple(&fields, "image_std")?),
            fields,
        };
        let fields = &processor.fields;
        let rescale = fields.number("rescale_factor", 1.0 / 255.0)?;
        if !fields.flag("do_rescale", true)? || (rescale * 255.0 - 1.0).abs() > 1e-6 {
            return Err(fields.unsupported("rescale_factor", "1/255 with do_rescale true"));
        }
        if processor.std.is_some_and(|std| std.iter().any(|&s| s <= 0.0)) {
            return Err(fields.unsupported("image_std", "three numbers above 0"));
        }
        fields.finish(&[&HARMLESS[..], harmless].concat())?;
        Ok(processor)
    }

    /// The picture as transformers' processor resizes and crops it, before it is normalised.
    pub(crate) fn apply(&self, picture: Picture) -> Picture {
        let (h, w) = (picture.height, picture.width);
        let [height, width] = match self.size.filter(|_| self.resizes) {
            None => [h, w],
            Some(Size::Exact(sides)) => sides,
            Some(Size::Shorter(side)) if w <= h => [(side * h) / w, side],
            Some(Size::Shorter(side)) => [side, (side * w) / h],
        };
        let picture = picture.resized(height, width, self.filter);
        match self.crop.filter(|_| self.crops) {
            None => picture,
            Some([height, width]) => picture.cropped(height, width),
        }
    }

    /// Height and width of every picture after [`Processor::apply`]; for a size that keeps the
    /// shape of pictures, those of a square one. `None` where that depends on the picture alone.
    pub(crate) fn sides(&self) -> Option<[usize; 2]> {
        let size = self.size.filter(|_| self.resizes).map(|size| match size {
            Size::Exact(sides) => sides,
            Size::Shorter(side) => [side; 2],
        });
        self.crop.filter(|_| self.crops).or(size)
    }
}

/// The class that the file names, if it names one.
fn class(fields: &ConfigFile) -> Result<Option<&'static Class>> {
    // Both may stand in a file; the newer field is the one that counts.
    fields.get("feature_extractor_type");
    let Some((field, name)) = ["image_processor_type", "feature_extractor_type"]
        .into_iter()
        .find_map(|field| Some((field, fields.get(field)?)))
    else {
        return Ok(None);
    };
    let known = || CLASSES.iter().map(|class| class.name).collect::<Vec<_>>().join(", ");
    let plain =
        name.as_str().map(|name| name.trim_end_matches("Fast").trim_end_matches("Pil").to_owned());
    let class = CLASSES.iter().find(|class| plain.as_deref() == Some(class.name));
    class.map(Some).ok_or_else(|| fields.unsupported(field, known()))
}

/// A size as a number, a list, or an object.
fn size(fields: &ConfigFile, field: &str, keeps_shape: bool) -> Result<Option<Size>> {
    let Some(value) = fields.get(field) else { return Ok(None) };
    let number = |value: &Value| value.as_u64().filter(|&n| (1..=LARGEST_SIDE).contains(&n));
    let found = match value {
        Value::Number(_) => number(value).map(|side| match keeps_shape {
            true => Size::Shorter(side as usize),
            false => Size::Exact([side as usize; 2]),
        }),
        Value::Array(sides) => match sides.as_slice() {
            [h, w] => number(h).zip(number(w)).map(|(h, w)| Size::Exact([h as usize, w as usize])),
            _ => None,
        },
        Value::Object(sides) => {
            let side = |name| sides.get(name).and_then(number).map(|side| side as usize);
            match (sides.len(), side("shortest_edge"), side("height"), side("width")) {
                (1, Some(side), None, None) => Some(Size::Shorter(side)),
                (2, None, Some(h), Some(w)) => Some(Size::Exact([h, w])),
                _ => None,
            }
        }
        _ => None,
    };
    let wanted =
        || format!("whole numbers from 1 to {LARGEST_SIDE} as height and width or shortest_edge");
    found.map(Some).ok_or_else(|| fields.unsupported(field, wanted()))
}

/// No network takes larger pictures; a bound keeps a corrupt file from asking for absurd memory.
const LARGEST_SIDE: u64 = 8192;

/// The filter that `resample` numbers.
fn filter(fields: &ConfigFile) -> Result<Option<Filter>> {
    let Some(value) = fields.get("resample") else { return Ok(None) };
    let wanted = "0 (nearest), 1 (Lanczos), 2 (bilinear), 3 (bicubic), 4 (box) or 5 (Hamming), as Pillow \
         numbers them";
    let found = value.as_u64().and_then(Filter::from_pillow);
    found.map(Some).ok_or_else(|| fields.unsupported("resample", wanted))
}

fn triple(fields: &ConfigFile, field: &str) -> Result<Option<[f32; 3]>> {
    Ok(fields.numbers(field, 3)?.map(|values| [values[0], values[1], values[2]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `tests/goldens/processor.py` made the pictures, with every filter and kind of size.
    #[test]
    fn pictures_are_those_of_transformers_to_the_byte() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/processor.json");
        let cases: Vec<Value> =
            serde_json::from_str(&std::fs::read_to_string(root).unwrap()).unwrap();
        assert!(cases.len() > 30);
        for case in cases {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join(OLD), case["config"].to_string()).unwrap();
            let folder = ModelFolder::new(folder.path());
            let processor = Processor::read(&folder, Filter::Nearest, &[]).unwrap();
            let side = |name: &str| case[name].as_u64().unwrap() as usize;
            let rgb = |name: &str| hex::decode(case[name].as_str().unwrap()).unwrap();
            let picture = Picture { height: side("height"), width: side("width"), rgb: rgb("rgb") };
            let found = processor.apply(picture);
            let what = format!("{} x {} in {}", side("height"), side("width"), case["config"]);
            assert_eq!(
                [found.height, found.width],
                [side("out_height"), side("out_width")],
                "{what}"
            );
            assert!(found.rgb == rgb("out"), "{what}");
        }
    }
}
