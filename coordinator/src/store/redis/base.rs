//! What every part of the store needs: the connection, the names of keys, the scripts.

use std::sync::Arc;

use ::redis::{AsyncCommands, FromRedisValue, Script, ScriptInvocation};
use fairlead_common::ids::JobId;

use super::{
    link::Link,
    scripts::{Scripts, Versioned},
};
use crate::store::{StoreError, decode};

#[derive(Debug)]
pub(super) struct Base {
    pub(super) link: Arc<Link>,
    pub(super) scripts: Scripts,
    /// Begins every key.
    prefix: String,
}

impl Base {
    pub(super) fn new(url: &str, prefix: &str) -> Result<Self, StoreError> {
        let link = Arc::new(Link::new(url)?);
        Ok(Self { link, scripts: Scripts::new(), prefix: format!("{{{prefix}}}") })
    }

    pub(super) fn key(&self, name: &str) -> String {
        format!("{}:{name}", self.prefix)
    }

    /// Runs a script with the arguments that `arguments` adds to the prefix and the time.
    pub(super) async fn script<T: FromRedisValue>(
        &self,
        what: &'static str,
        script: &Script,
        now: i64,
        arguments: impl Fn(&mut ScriptInvocation<'_>),
    ) -> Result<T, StoreError> {
        let mut invocation = script.key(&self.prefix);
        invocation.arg(now);
        arguments(&mut invocation);
        let invocation = &invocation;
        self.link
            .run(what, |mut connection| async move {
                invocation.invoke_async::<T>(&mut connection).await
            })
            .await
    }

    /// A job's record.
    pub(super) async fn read(&self, job: JobId) -> Result<Option<Versioned>, StoreError> {
        let key = &self.key(&format!("job:{job}"));
        let found: (Option<u64>, Option<Vec<u8>>) =
            self.link
                .run("read a job", |mut connection| async move {
                    connection.hmget(key, &["v", "r"]).await
                })
                .await?;
        let (Some(version), Some(bytes)) = found else { return Ok(None) };
        Ok(Some(Versioned { version, record: decode(&bytes, "a job")? }))
    }
}
