//! What would refuse every job of a local cluster, found before a model is loaded: that may take minutes.
//! The coordinator decides again, with what the loaded models say of themselves.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use fairlead_coordinator::Policy;
use fairlead_energy::{ConceptSet, calibration::Calibration};
use fairlead_proto::v1::JobSpec;
use fairlead_worker::generator;

use crate::cluster::{self, ClusterOptions};

/// Refuses a cluster of these options that could not make the jobs of `spec`: its policy is unknown, a
/// concept is in no pack, a folder holds no generator, or a calibration is missing.
pub(crate) fn check(options: &ClusterOptions, spec: &JobSpec) -> Result<()> {
    let policies = cluster::policies(options)?;
    let Some(policy) = policies.get(&spec.policy) else {
        let known: Vec<&str> = policies.names().collect();
        bail!("--policy is `{}`; the policies file has {}", spec.policy, known.join(", "));
    };
    let generators = options.models.generators()?;
    generators.iter().try_for_each(|dir| generator::check(dir))?;
    let set = ConceptSet::load(&options.models.concepts()?)?;
    let concepts: BTreeSet<&str> =
        set.concepts().iter().map(|concept| concept.name.as_str()).collect();
    check_concepts(policy, spec, &concepts)?;
    if policy.observe_only || policy.allow_calibration_fallback {
        return Ok(());
    }
    let calibrations = calibrations(&options.models.calibrations()?)?;
    for dir in &generators {
        let name = generator::model_name(dir)?;
        // A number of steps that nothing can take is the coordinator's to refuse.
        let steps = spec.steps.filter(|&steps| steps > 0);
        let fits = calibrations.iter().filter(|calibration| {
            let of: BTreeSet<&str> = calibration.concepts.iter().map(|c| c.name.as_str()).collect();
            let setup = &calibration.setup;
            setup.generator_name == name
                && of == concepts
                && steps.is_none_or(|steps| setup.steps == steps)
        });
        // Which of them is whose is known when the energies are loaded.
        let energies: BTreeSet<&str> = fits.map(|c| c.setup.energy_model.as_str()).collect();
        if energies.len() < needed(policy, options)? {
            let steps = steps.map(|steps| format!(" at {steps} steps")).unwrap_or_default();
            bail!(
                "`{name}` has no calibration{steps} for every energy and these concepts, which policy `{}` \
                 needs: make it with `{}`, or set allow_calibration_fallback in the policy",
                policy.name,
                command(options, spec, dir)?
            );
        }
    }
    Ok(())
}

/// Every concept that is asked for by name is in a pack.
fn check_concepts(policy: &Policy, spec: &JobSpec, known: &BTreeSet<&str>) -> Result<()> {
    let by_policy = policy.concepts.iter().map(|name| (name, "the policy"));
    let by_flag = spec.extra_concepts.iter().map(|name| (name, "--concept"));
    for (name, by) in by_policy.chain(by_flag) {
        if !known.contains(name.as_str()) {
            let known: Vec<&str> = known.iter().copied().collect();
            bail!("{by} names the concept `{name}`; the packs have {}", known.join(", "));
        }
    }
    Ok(())
}

/// All calibrations in `folder`, which need not be there.
fn calibrations(folder: &Path) -> Result<Vec<Calibration>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let failed = || format!("cannot read the calibrations in {}", folder.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(failed)? {
        let path = entry.with_context(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            found.push(Calibration::load(&path)?);
        }
    }
    Ok(found)
}

/// How many energies must have a calibration.
fn needed(policy: &Policy, options: &ClusterOptions) -> Result<usize> {
    let energies: BTreeSet<PathBuf> = options.models.energies()?.into_iter().collect();
    match policy.energies.len() {
        0 => Ok(energies.len()),
        named => Ok(named.min(energies.len())),
    }
}

/// The command that makes the calibrations that are missing.
fn command(options: &ClusterOptions, spec: &JobSpec, dir: &Path) -> Result<String> {
    let models = &options.models;
    let mut command = format!("fairlead calibrate --model {}", dir.display());
    let mut add = |flag: &str, path: &Path| {
        command.push_str(&format!(" {flag} {}", path.display()));
    };
    models.energies()?.iter().for_each(|energy| add("--energy", energy));
    models.concepts()?.iter().for_each(|pack| add("--concepts", pack));
    add("--out", &models.calibrations()?);
    if let Some(steps) = spec.steps {
        command.push_str(&format!(" --steps {steps}"));
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assets::ModelArgs;

    fn options() -> ClusterOptions {
        let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets");
        ClusterOptions::temporary(&ModelArgs {
            generators: Vec::new(),
            energies: Vec::new(),
            concepts: Vec::new(),
            device: None,
            energy_device: None,
            calibrations: None,
            assets: Some(assets),
        })
    }

    fn refused(options: &ClusterOptions, spec: &JobSpec) -> String {
        format!("{:#}", check(options, spec).expect_err("it is refused"))
    }

    #[test]
    fn what_would_refuse_every_job_is_found_without_a_model() {
        let options = options();
        check(&options, &JobSpec::default()).expect("the embedded models are calibrated");
        let spec = JobSpec { steps: Some(17), ..Default::default() };
        let error = refused(&options, &spec);
        assert!(error.starts_with("`emojiland-sd` has no calibration at 17 steps for "), "{error}");
        assert!(error.contains("which policy `default` needs: make it with `fairlead "), "{error}");
        assert!(error.contains("/emojiland-clip --concepts "), "{error}");
        assert!(error.contains("/calibrations --steps 17`"), "{error}");
        check(&options, &JobSpec { policy: "unsteered".into(), ..spec }).expect("it needs none");
        let spec = JobSpec { policy: "strict".into(), ..Default::default() };
        assert_eq!(
            refused(&options, &spec),
            "--policy is `strict`; the policies file has calibration, default, unsteered"
        );
        let spec = JobSpec { extra_concepts: vec!["hat".into()], ..Default::default() };
        let error = refused(&options, &spec);
        assert!(error.starts_with("--concept names the concept `hat`; the packs have "), "{error}");
    }

    #[test]
    fn every_energy_needs_a_calibration_of_these_concepts() {
        let mut options = options();
        options.models.energies = vec!["emojiland-clip".into(), "emojiland-siglip".into()];
        check(&options, &JobSpec::default()).expect("both are calibrated");
        let third = tempfile::tempdir().expect("a folder");
        options.models.energies.push(third.path().into());
        let error = refused(&options, &JobSpec::default());
        assert!(error.contains("for every energy and these concepts"), "{error}");
    }

    #[test]
    fn a_folder_that_holds_no_generator_is_named_before_an_energy_is_loaded() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut options = options();
        options.models.generators = vec![folder.path().into()];
        assert!(refused(&options, &JobSpec::default()).contains("model_index.json"));
    }
}
