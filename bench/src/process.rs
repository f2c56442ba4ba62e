//! What a process has cost, as `/proc` tells.

use anyhow::{Context, Result};

/// Ticks of the clock that `/proc` counts processor time in, the same on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// What a process has cost so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    /// Seconds on processors, of all threads.
    pub(crate) cpu: f64,
    /// Resident bytes now.
    pub(crate) resident: u64,
}

/// Of the process `id`.
pub(crate) fn usage(id: u32) -> Result<Usage> {
    let read = |file: &str| {
        let path = format!("/proc/{id}/{file}");
        std::fs::read_to_string(&path).with_context(|| path)
    };
    let cpu = cpu_seconds(&read("stat")?).context("unknown form of /proc/PID/stat")?;
    let resident = bytes_of(&read("status")?, "VmRSS:").context("no VmRSS in /proc")?;
    Ok(Usage { cpu, resident })
}

/// User and system time: the 14th and 15th field, counted from after the name, which may hold anything.
fn cpu_seconds(stat: &str) -> Option<f64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / TICKS_PER_SECOND)
}

/// A size in `/proc/PID/status`.
pub(crate) fn bytes_of(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    Some(1024 * line.split_whitespace().next()?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_behind_odd_names() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 3 0 99 1000 10";
        assert_eq!(cpu_seconds(stat), Some(3.0));
        assert_eq!(bytes_of("VmPeak:\t 9 kB\nVmRSS:\t    12 kB\n", "VmRSS:"), Some(12_288));
        assert_eq!(bytes_of("Threads: 1", "VmRSS:"), None);
    }

    #[test]
    fn this_process_costs_something() {
        assert!(usage(std::process::id()).expect("it runs").resident > 1 << 16);
    }
}
