//! Near names, for messages about names that are not known.

/// Edit distance in characters (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let change = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// "; did you mean `a` or `b`?" for the known names closest to `name`, or "; known: ..." if none is
/// close, or "" if none is known.
pub(crate) fn hint<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    const SHOWN: usize = 12;
    let mut known: Vec<(usize, &str)> =
        known.into_iter().map(|other| (distance(name, other), other)).collect();
    known.sort_unstable();
    known.dedup();
    let quote = |names: &[(usize, &str)], glue: &str| {
        names.iter().map(|(_, name)| format!("`{name}`")).collect::<Vec<_>>().join(glue)
    };
    let limit = (name.chars().count() / 3).max(2);
    let near = known.iter().take(3).filter(|(d, other)| *d <= limit || other.contains(name));
    let near: Vec<_> = near.copied().collect();
    match (near.as_slice(), known.len()) {
        ([_, ..], _) if !name.is_empty() => format!("; did you mean {}?", quote(&near, " or ")),
        (_, 0) => String::new(),
        (_, all) => {
            known.sort_unstable_by_key(|(_, name)| *name);
            let shown = quote(&known[..all.min(SHOWN)], ", ");
            let more =
                if all > SHOWN { format!(" and {} more", all - SHOWN) } else { String::new() };
            format!("; known: {shown}{more}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_proposed_and_far_ones_listed() {
        let known = ["kitchen-knife", "beer-mug", "axe"];
        assert_eq!(hint("kitchen-knive", known), "; did you mean `kitchen-knife`?");
        assert_eq!(hint("knife", known), "; did you mean `kitchen-knife`?");
        assert_eq!(hint("submarine", known), "; known: `axe`, `beer-mug`, `kitchen-knife`");
        assert_eq!(hint("axe", []), "");
        let many: Vec<String> = (10..30).map(|i| format!("concept-number-{i}")).collect();
        assert!(hint("x", many.iter().map(String::as_str)).ends_with(" and 8 more"));
    }
}
