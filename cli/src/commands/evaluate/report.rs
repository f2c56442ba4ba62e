//! What an evaluation found: shares with Wilson intervals, as Markdown, JSON and a page of pairs.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    images::{Made, Side},
    sets::Item,
};
use crate::share::Share;

/// What is on the two images of one item, and how they relate.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Outcome {
    #[serde(flatten)]
    pub(super) item: Item,
    pub(super) unsteered: Made,
    pub(super) steered: Made,
    /// What the judge finds; `None` where there is no picture.
    pub(super) found_unsteered: Vec<String>,
    pub(super) found_steered: Option<Vec<String>>,
    /// Something forbidden is there: the target asked for, or where none is named anything that the
    /// judge forbids.
    pub(super) target_unsteered: bool,
    pub(super) target_steered: Option<bool>,
    /// The same for the permitted object, where one is asked for.
    pub(super) other_unsteered: Option<bool>,
    pub(super) other_steered: Option<bool>,
    pub(super) identical: bool,
    /// Structural similarity of the two.
    pub(super) ssim: Option<f64>,
}

/// All outcomes of one cell.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) title: String,
    pub(super) judge: String,
    pub(super) unsteered: Side,
    pub(super) steered: Side,
    pub(super) outcomes: Vec<Outcome>,
}

impl Report {
    pub(super) fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report serialises into memory")
    }

    /// The tables a person reads.
    pub(super) fn markdown(&self) -> String {
        let mut text = format!(
            "{}; judged by {}. Shares with 95 % Wilson intervals. Withheld images count neither as \
             removed nor as kept.\n\n| prompts | measure | unsteered | steered |\n|---|---|---|---|\n",
            self.title, self.judge
        );
        for (kind, outcomes) in self.by_kind() {
            for [measure, unsteered, steered] in rows(&outcomes) {
                text.push_str(&format!("| {kind} | {measure} | {unsteered} | {steered} |\n"));
            }
        }
        let targets = self.by_target();
        if !targets.is_empty() {
            text.push_str(
                "\n| target | found unsteered | found steered | withheld |\n|---|---|---|---|\n",
            );
        }
        for (target, outcomes) in targets {
            let cells = [
                share(&outcomes, |o| Some(o.target_unsteered)),
                share(&outcomes, |o| o.target_steered),
                share(&outcomes, |o| Some(o.steered.withheld)),
            ]
            .map(|share| format!("{} of {}", share.hits, share.total));
            text.push_str(&format!("| {target} | {} |\n", cells.join(" | ")));
        }
        text
    }

    /// Kinds in the order of their first item.
    pub(super) fn by_kind(&self) -> Vec<(&str, Vec<&Outcome>)> {
        let mut kinds: Vec<(&str, Vec<&Outcome>)> = Vec::new();
        for outcome in &self.outcomes {
            match kinds.iter_mut().find(|(kind, _)| *kind == outcome.item.kind) {
                Some((_, outcomes)) => outcomes.push(outcome),
                None => kinds.push((&outcome.item.kind, vec![outcome])),
            }
        }
        kinds
    }

    fn by_target(&self) -> BTreeMap<&str, Vec<&Outcome>> {
        let mut targets: BTreeMap<&str, Vec<&Outcome>> = BTreeMap::new();
        for outcome in &self.outcomes {
            if let Some(target) = &outcome.item.target {
                targets.entry(target).or_default().push(outcome);
            }
        }
        targets
    }
}

/// Measure, unsteered, steered.
fn rows(outcomes: &[&Outcome]) -> Vec<[String; 3]> {
    let row = |measure: &str, unsteered: String, steered: String| {
        [measure.to_owned(), unsteered, steered]
    };
    let benign = outcomes.iter().all(|o| o.item.benign);
    let mut rows = Vec::new();
    if !benign {
        rows.push(row(
            "target found",
            share(outcomes, |o| Some(o.target_unsteered)).text(),
            share(outcomes, |o| o.target_steered).text(),
        ));
    }
    if outcomes.iter().any(|o| o.item.other.is_some()) {
        rows.push(row(
            if benign { "object found" } else { "other object found, steered: where it was there" },
            share(outcomes, |o| o.other_unsteered).text(),
            kept(outcomes).text(),
        ));
    }
    rows.push(row("withheld", String::new(), share(outcomes, |o| Some(o.steered.withheld)).text()));
    rows.push(row(
        "identical, byte for byte",
        String::new(),
        share(outcomes, |o| Some(o.identical)).text(),
    ));
    let mean = |values: Vec<f64>| match values.len() {
        0 => "none".to_owned(),
        n => format!("{:.3}", values.iter().sum::<f64>() / n as f64),
    };
    rows.push(row(
        "SSIM to the unsteered",
        String::new(),
        mean(outcomes.iter().filter_map(|o| o.ssim).collect()),
    ));
    let seconds = |made: fn(&Outcome) -> &Made| {
        let seconds = outcomes.iter().map(|o| f64::from(made(o).engine_ms) / 1e3).collect();
        format!("{} s", mean(seconds))
    };
    rows.push(row("time an image", seconds(|o| &o.unsteered), seconds(|o| &o.steered)));
    rows
}

/// Share of hits among the outcomes where the question applies.
fn share(outcomes: &[&Outcome], question: impl Fn(&Outcome) -> Option<bool>) -> Share {
    Share::of(outcomes.iter().filter_map(|outcome| question(outcome)))
}

/// Where the permitted object was there unsteered: is it there steered? Withheld counts as no.
fn kept(outcomes: &[&Outcome]) -> Share {
    share(outcomes, |o| (o.other_unsteered == Some(true)).then_some(o.other_steered == Some(true)))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn report(steered: &[(Option<bool>, Option<bool>)]) -> Report {
        let made = |withheld| Made {
            withheld,
            pixels: "p".into(),
            reruns: 0,
            corrections: 0,
            engine_ms: 500,
        };
        let side = Side {
            name: "steered",
            generator: "g".into(),
            steps: None,
            guidance: None,
            policy: String::new(),
            negative_prompt: String::new(),
            conditions: Vec::new(),
            items: String::new(),
        };
        let outcome = |(index, &(target, other)): (usize, &(Option<bool>, Option<bool>))| Outcome {
            item: Item {
                kind: "compositional".into(),
                index,
                prompt: "an <axe> & a cat".into(),
                seed: 1,
                guidance: None,
                target: Some("axe".into()),
                other: Some("cat".into()),
                benign: false,
            },
            unsteered: made(false),
            steered: made(target.is_none()),
            found_unsteered: vec!["axe".into(), "cat".into()],
            found_steered: target.map(|_| Vec::new()),
            target_unsteered: true,
            target_steered: target,
            other_unsteered: Some(true),
            other_steered: other,
            identical: false,
            ssim: target.map(|_| 0.5),
        };
        Report {
            title: "a test".into(),
            judge: "nobody".into(),
            unsteered: side.unsteered(),
            steered: side,
            outcomes: steered.iter().enumerate().map(outcome).collect(),
        }
    }

    #[test]
    fn withheld_images_are_neither_removed_targets_nor_kept_objects() {
        let report = report(&[(Some(false), Some(true)), (None, None)]);
        let all: Vec<&Outcome> = report.outcomes.iter().collect();
        assert_eq!(share(&all, |o| o.target_steered), Share { hits: 0, total: 1 });
        assert_eq!(kept(&all), Share { hits: 1, total: 2 });
        let text = report.markdown();
        assert!(text.contains("| axe | 2 of 2 | 0 of 1 | 1 of 2 |"), "{text}");
        assert!(text.contains("| compositional | time an image | 0.500 s | 0.500 s |"), "{text}");
    }
}
