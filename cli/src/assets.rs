//! Where the models that ship with the project are.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use fairlead_models::DeviceName;

/// Which models a local cluster runs.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Models")]
pub(crate) struct ModelArgs {
    /// Generator: a diffusers folder (model_index.json inside), e.g. a Stable Diffusion checkout,
    /// the id org/name of one in the Hugging Face cache, or the name of an embedded one:
    /// emojiland-sd (default), emojiland-sd3. Repeatable.
    #[arg(long = "model", value_name = "DIR", env = "FAIRLEAD_MODEL", value_delimiter = ',')]
    pub(crate) generators: Vec<PathBuf>,
    /// Energy: a transformers CLIPModel or SiglipModel folder, an open_clip one, the id org/name of
    /// one in the Hugging Face cache, or the name of an embedded one:
    /// emojiland-clip (default), emojiland-siglip. Repeatable: each becomes a node of its own, and
    /// all of them must be satisfied.
    #[arg(long = "energy", value_name = "DIR", env = "FAIRLEAD_ENERGY", value_delimiter = ',')]
    pub(crate) energies: Vec<PathBuf>,
    /// Concepts to steer away from: a pack, as TOML, or a folder of packs; repeatable. Default: the
    /// six packs of assets/concepts, twenty concepts.
    #[arg(
        long = "concepts",
        value_name = "FILE|DIR",
        env = "FAIRLEAD_CONCEPTS",
        value_delimiter = ','
    )]
    pub(crate) concepts: Vec<PathBuf>,
    /// Device of the generators: cpu, or cuda:N in a build with that feature.
    #[arg(long, value_name = "DEVICE", env = "FAIRLEAD_DEVICE")]
    pub(crate) device: Option<DeviceName>,
    /// Device of the energies. Default: that of the generators.
    #[arg(long, value_name = "DEVICE", env = "FAIRLEAD_ENERGY_DEVICE")]
    pub(crate) energy_device: Option<DeviceName>,
    /// Folder of calibrations, as written by `fairlead calibrate`. Default: assets/calibrations.
    #[arg(long = "calibrations", value_name = "DIR", env = "FAIRLEAD_CALIBRATIONS")]
    pub(crate) calibrations: Option<PathBuf>,
    /// Folder of the embedded models. Default: `assets` in the working folder, beside the
    /// binary, or in the source tree it was built from.
    #[arg(long = "assets", value_name = "DIR", env = "FAIRLEAD_ASSETS")]
    pub(crate) assets: Option<PathBuf>,
}

impl ModelArgs {
    pub(crate) fn generators(&self) -> Result<Vec<PathBuf>> {
        self.folders(&self.generators, "emojiland-sd")
    }

    pub(crate) fn energies(&self) -> Result<Vec<PathBuf>> {
        self.folders(&self.energies, "emojiland-clip")
    }

    /// Each folder that was given, or the embedded model of that name.
    fn folders(&self, given: &[PathBuf], default: &str) -> Result<Vec<PathBuf>> {
        if given.is_empty() {
            return Ok(vec![self.embedded(default)?]);
        }
        let folder = |path: &PathBuf| match path.to_str() {
            Some(name) if !path.exists() && !name.contains(['/', '\\']) => self.embedded(name),
            _ => Ok(path.clone()),
        };
        given.iter().map(folder).collect()
    }

    pub(crate) fn concepts(&self) -> Result<Vec<PathBuf>> {
        match self.concepts.as_slice() {
            [] => Ok(vec![self.embedded("concepts")?]),
            given => Ok(given.to_vec()),
        }
    }

    pub(crate) fn calibrations(&self) -> Result<PathBuf> {
        self.or_embedded(&self.calibrations, "calibrations")
    }

    pub(crate) fn judge(&self) -> Result<PathBuf> {
        self.embedded("emojiland-judge")
    }

    pub(crate) fn policies(&self) -> Result<PathBuf> {
        self.embedded("policies.toml")
    }

    pub(crate) fn measuring_policies(&self) -> Result<PathBuf> {
        self.embedded("policies-measuring.toml")
    }

    pub(crate) fn objects(&self) -> Result<PathBuf> {
        self.embedded("emojiland-objects.json")
    }

    /// The models are the server's to choose: naming others beside one would be ignored, and
    /// ignoring a concepts file in silence is worse than an error. `more` are further flags that
    /// must not be given.
    pub(crate) fn refuse_beside_server(&self, more: &[(&str, bool)]) -> Result<()> {
        let given = [
            ("--model", !self.generators.is_empty()),
            ("--energy", !self.energies.is_empty()),
            ("--concepts", !self.concepts.is_empty()),
            ("--device", self.device.is_some()),
            ("--energy-device", self.energy_device.is_some()),
        ];
        match given.iter().chain(more).find(|(_, given)| *given) {
            None => Ok(()),
            Some((flag, _)) => bail!(
                "{flag} has no effect on a running cluster (--server or FAIRLEAD_SERVER): leave it \
                 out, or leave out the server to run a cluster of your own"
            ),
        }
    }

    fn or_embedded(&self, given: &Option<PathBuf>, name: &str) -> Result<PathBuf> {
        match given {
            Some(path) => Ok(path.clone()),
            None => self.embedded(name),
        }
    }

    fn embedded(&self, name: &str) -> Result<PathBuf> {
        let candidates = match &self.assets {
            Some(folder) => vec![folder.clone()],
            None => default_folders(),
        };
        let found = candidates.iter().map(|folder| folder.join(name)).find(|path| path.exists());
        match found {
            Some(path) => Ok(path),
            None => bail!(
                "`{name}` is in none of: {}; point --assets at the project's assets folder",
                candidates
                    .iter()
                    .map(|folder| folder.display().to_string())
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        }
    }
}

fn default_folders() -> Vec<PathBuf> {
    let beside_binary = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(|folder| folder.join("assets")));
    let source_tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets");
    [Some(PathBuf::from("assets")), beside_binary, Some(source_tree)]
        .into_iter()
        .flatten()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_asset_names_the_folders_searched() {
        let empty = tempfile::tempdir().expect("a temporary folder");
        let args = ModelArgs {
            generators: vec![],
            energies: vec!["else/where".into()],
            concepts: vec![],
            device: None,
            energy_device: None,
            calibrations: None,
            assets: Some(empty.path().into()),
        };
        let message = args.generators().expect_err("nothing is there").to_string();
        assert!(message.contains("emojiland-sd") && message.contains("--assets"), "{message}");
        assert_eq!(args.energies().expect("it was given"), [PathBuf::from("else/where")]);
        let message = args.refuse_beside_server(&[]).expect_err("--energy is given").to_string();
        assert!(message.contains("--energy"), "{message}");
    }
}
