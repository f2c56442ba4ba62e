//! A short soak run; `make soak` is a long one.

use anyhow::Result;
use fairlead_tests::soak::{Options, run};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_lose_duplicate_and_change_nothing() -> Result<()> {
    let report = run(Options { images: 60, faults: 8, seed: 1 }).await?;
    println!("{report}");
    assert!(report.is_clean(), "{report}\nagain: make soak N=60 SEED={}", report.seed);
    assert!(report.compared() >= 60 && report.faults.len() >= 4, "{report}");
    Ok(())
}
