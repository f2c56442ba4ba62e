//! Settings of a Redis that let it lose jobs. Read with INFO, because managed ones forbid CONFIG.

/// What makes a Redis unfit, as its INFO tells.
pub(super) fn unfit(info: &str) -> Vec<String> {
    let mut found = Vec::new();
    match value(info, "maxmemory_policy") {
        Some("noeviction") => {}
        Some(policy) => found.push(format!(
            "its maxmemory-policy is `{policy}`, so it may delete jobs when its memory is full; set \
             `maxmemory-policy noeviction`"
        )),
        None => unknown("maxmemory_policy", "maxmemory-policy noeviction"),
    }
    match value(info, "aof_enabled") {
        Some("1") => {}
        Some(_) => found.push(
            "it keeps no append-only file, so a restart loses jobs; set `appendonly yes`"
                .to_owned(),
        ),
        None => unknown("aof_enabled", "appendonly yes"),
    }
    found
}

fn unknown(field: &str, wanted: &str) {
    tracing::warn!(
        field,
        wanted,
        "redis does not tell this setting; see to it that it is as wanted"
    );
}

fn value<'a>(info: &'a str, field: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.trim().strip_prefix(field)?.strip_prefix(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_setting_that_loses_jobs_is_named_with_what_to_set() {
        let info = |policy: &str, aof: &str| {
            format!(
                "# Memory\r\nmaxmemory:0\r\nmaxmemory_policy:{policy}\r\n\r\n# Persistence\r\n\
                 aof_enabled:{aof}\r\naof_rewrite_in_progress:0\r\n"
            )
        };
        assert!(unfit(&info("noeviction", "1")).is_empty());
        let both = unfit(&info("allkeys-lru", "0"));
        assert!(both[0].contains("`allkeys-lru`") && both[0].contains("noeviction"), "{both:?}");
        assert!(both[1].contains("appendonly yes") && both.len() == 2, "{both:?}");
        assert!(unfit("").is_empty(), "what a Redis does not tell is not held against it");
    }
}
