//! Inspect: everything known of a key and why, without side effects: no use counted, no hint given,
//! no fetch begun.

use std::time::Duration;

use holdfast_proto::{
    Key, Slot,
    peer::TombstoneRecord,
    timeline::{FOREVER, Millis, Phase},
    v1::{self, FailureClass, Origin},
};
use holdfast_raft::{Inspected, View};

use super::{
    Cache,
    answer::{self, timestamp},
    controls::Controls,
};
use crate::{error::Error, operation::Call, policy::Policy};

/// What `why` tells from.
struct Known<'a> {
    view: Option<&'a View>,
    tombstone: Option<&'a TombstoneRecord>,
    policy: Option<&'a Policy>,
    refreshing: bool,
    now: Millis,
}

impl Cache {
    pub async fn inspect(
        &self,
        request: v1::InspectRequest,
        call: &Call,
    ) -> Result<v1::InspectResponse, Error> {
        let key = Key::new(request.key).map_err(|invalid| Error::key("key", invalid))?;
        let controls = Controls::parse(request.consistency, request.token)?;
        let replica = self.replica_of(&key)?;
        self.seen_here(replica, &controls, &call.deadline).await?;

        let standing = replica.standing();
        let inspected = replica.inspect(&key).await;
        let Inspected {
            view,
            in_memory,
            tombstone,
        } = inspected.map_err(|error| Error::disk(&error))?;
        let now = controls.now(replica);
        let rules = self.rules.load_full();
        let matched = rules.matched(&key);
        let policy = matched.as_ref().map(|matched| matched.policy);
        let behind = self.behind(&key, true, policy);
        let live = view.as_ref().filter(|view| view.is_live(now));
        let answer = live.map_or_else(
            || answer::miss(behind),
            |view| v1::Answer {
                value: None,
                ..answer::stored(view, now, behind)
            },
        );
        let known = Known {
            view: view.as_ref(),
            tombstone: tombstone.as_ref(),
            policy,
            refreshing: behind.refreshing,
            now,
        };
        let (position, token) = self.position(&*self.peers()?, &[(replica, standing)]);
        Ok(v1::InspectResponse {
            answer: Some(answer),
            replica: Some(position),
            token: token.encode(),
            why: why(&known),
            shard: replica.shard(),
            slot: Slot::of(&key).0.into(),
            now: timestamp(now),
            entry: view.as_ref().map(|view| stored_entry(view, in_memory)),
            tombstone_revision: tombstone.map(|tombstone| tombstone.revision),
            policy: matched.as_ref().map(|matched| v1::MatchedPolicy {
                r#match: matched.policy.pattern.as_str().to_owned(),
                captures: matched
                    .captures
                    .as_slice()
                    .iter()
                    .map(|capture| String::from_utf8_lossy(capture).into_owned())
                    .collect(),
                upstream: matched.policy.upstream.to_string(),
            }),
        })
    }
}

fn stored_entry(view: &View, in_memory: bool) -> v1::StoredEntry {
    let timeline = view.timeline();
    v1::StoredEntry {
        version: view.version(),
        changed: view.changed(),
        origin: view.origin().into(),
        size_bytes: view.size_bytes(),
        tags: view.tags().to_vec(),
        fetched_at: timestamp(timeline.fetched_at),
        refresh_at: timestamp(timeline.refresh_at),
        fresh_until: timestamp(timeline.fresh_until),
        stale_until: timestamp(timeline.stale_until()),
        expires_at: timestamp(timeline.expires_at()),
        content_hash: view.content_hash(),
        in_memory,
    }
}

/// In words for people, the most telling first.
fn why(known: &Known<'_>) -> Vec<String> {
    let mut why = Vec::new();
    match known.view {
        Some(view) => {
            why.push(phase(view, known.now));
            why.push(origin(view, known.policy.is_some()).to_owned());
            if known.policy.is_some() && view.is_live(known.now) {
                why.push(refresh(view, known.now));
            }
            why.extend(view.failure().map(|failure| {
                let class = class_name(failure.class());
                let status = if failure.status == 0 { String::new() } else { format!(" {}", failure.status) };
                let next = until(known.now, failure.next_attempt_ms);
                format!("the last {} fetches failed, most lately with {class}{status}; the next attempt is due {next}", failure.count)
            }));
        }
        None => why.push("nothing is stored".into()),
    }
    if let Some(tombstone) = known.tombstone {
        let kept = until(known.now, tombstone.expires_at_ms);
        why.push(format!(
            "it was deleted or invalidated at revision {}; no fetch from before may bring it back (kept until {kept})",
            tombstone.revision
        ));
    }
    why.push(match (known.policy, known.refreshing) {
        (Some(policy), false) => format!(
            "policy `{}` takes it from upstream `{}`",
            policy.pattern.as_str(),
            policy.upstream
        ),
        (Some(policy), true) => format!(
            "policy `{}`: a fetch from upstream `{}` is under way",
            policy.pattern.as_str(),
            policy.upstream
        ),
        (None, _) => "no policy matches: it changes only by clients".into(),
    });
    why
}

fn phase(view: &View, now: Millis) -> String {
    let timeline = view.timeline();
    match view.phase(now) {
        Phase::Fresh if timeline.fresh_until == FOREVER => "fresh for ever".into(),
        Phase::Fresh => format!("fresh, until {}", until(now, timeline.fresh_until)),
        Phase::Stale => format!("stale, served until {}", until(now, timeline.stale_until())),
        Phase::StaleOnError => {
            format!(
                "past stale_while_revalidate, served if the upstream fails, until {}",
                until(now, timeline.expires_at())
            )
        }
        Phase::Expired if now < timeline.kept_until() => format!(
            "expired: served no more, and kept until {} in case that the upstream says it is still the same",
            until(now, timeline.kept_until())
        ),
        Phase::Expired => "expired: served no more, and removed at the next sweep".into(),
    }
}

fn refresh(view: &View, now: Millis) -> String {
    let timeline = view.timeline();
    match view.is_due(now) {
        true => "past its refresh point: the next read lets the leader refresh it".into(),
        false if view.origin() == Origin::Plain => "never refreshed by itself".into(),
        false if timeline.refresh_at == FOREVER => {
            format!(
                "not refreshed ahead: due once it is stale, {}",
                until(now, timeline.fresh_until)
            )
        }
        false => format!("a refresh is due {}", until(now, timeline.refresh_at)),
    }
}

fn origin(view: &View, has_upstream: bool) -> &'static str {
    match (view.origin(), has_upstream) {
        _ if view.is_negative() => "the upstream said that it has no such thing",
        (Origin::Fetched, _) => "the value is from the upstream",
        (Origin::Set, _) => "a client set the value; its upstream refreshes it in time",
        (Origin::Plain, true) => "a client set the value before the key had an upstream",
        (Origin::Plain | Origin::Unspecified, _) => "a client set the value",
    }
}

fn class_name(class: FailureClass) -> &'static str {
    let name = class.as_str_name();
    name.strip_prefix("FAILURE_CLASS_").unwrap_or(name)
}

fn until(now: Millis, instant: Millis) -> String {
    match instant {
        FOREVER => "for ever".into(),
        instant if instant <= now => "now".into(),
        instant => format!(
            "in {}",
            humantime::format_duration(Duration::from_millis(instant - now))
        ),
    }
}

#[cfg(test)]
mod tests {
    use holdfast_proto::peer::{EntryRecord, FailureRecord};

    use super::*;

    fn told(record: &EntryRecord, now: Millis) -> Vec<String> {
        why(&Known {
            view: Some(&View::from(record.clone())),
            tombstone: None,
            policy: None,
            refreshing: false,
            now,
        })
    }

    #[test]
    fn what_is_stored_is_explained_by_its_phase() {
        let record = EntryRecord {
            fetched_at_ms: 1_000,
            refresh_at_ms: 1_800,
            fresh_until_ms: 2_000,
            stale_while_revalidate_ms: 1_000,
            stale_if_error_ms: 3_000,
            origin: Origin::Fetched.into(),
            ..Default::default()
        };
        assert_eq!(told(&record, 1_500)[0], "fresh, until in 500ms");
        assert_eq!(told(&record, 2_500)[0], "stale, served until in 500ms");
        assert!(told(&record, 3_500)[0].starts_with("past stale_while_revalidate"));
        assert!(told(&record, 5_000)[0].ends_with("removed at the next sweep"));
        let kept = EntryRecord {
            keep_ms: 2_000,
            ..record.clone()
        };
        assert!(told(&kept, 5_000)[0].contains("kept until in 2s"));
        let negative = EntryRecord {
            is_negative: true,
            ..record
        };
        assert!(told(&negative, 1_500)[1].contains("no such thing"));
        let plain = EntryRecord {
            fresh_until_ms: FOREVER,
            refresh_at_ms: FOREVER,
            origin: Origin::Plain.into(),
            ..Default::default()
        };
        assert_eq!(
            told(&plain, 1),
            [
                "fresh for ever",
                "a client set the value",
                "no policy matches: it changes only by clients"
            ]
        );
    }

    #[test]
    fn a_failure_and_a_tombstone_are_told() {
        let failure = FailureRecord {
            class: FailureClass::Status.into(),
            status: 503,
            count: 4,
            at_ms: 1,
            next_attempt_ms: 3_000,
        };
        let record = EntryRecord {
            fresh_until_ms: 2_000,
            failure: Some(failure),
            ..Default::default()
        };
        let lines = told(&record, 1_000);
        assert!(
            lines.contains(&"the last 4 fetches failed, most lately with STATUS 503; the next attempt is due in 2s".to_owned()),
            "{lines:?}"
        );

        let tombstone = TombstoneRecord {
            revision: 12,
            expires_at_ms: 601_000,
        };
        let lines = why(&Known {
            view: None,
            tombstone: Some(&tombstone),
            policy: None,
            refreshing: false,
            now: 1_000,
        });
        assert_eq!(lines[0], "nothing is stored");
        assert!(
            lines[1].contains("at revision 12") && lines[1].contains("in 10m"),
            "{lines:?}"
        );
    }

    #[test]
    fn an_entry_is_told_with_all_its_instants() {
        let record = EntryRecord {
            version: 3,
            changed: 5,
            fetched_at_ms: 1_000,
            refresh_at_ms: FOREVER,
            fresh_until_ms: 2_000,
            stale_if_error_ms: 1_000,
            ..Default::default()
        };
        let entry = stored_entry(&View::from(record), true);
        assert_eq!(
            (entry.version, entry.changed, entry.in_memory),
            (3, 5, true)
        );
        assert_eq!(entry.refresh_at, None);
        assert_eq!(
            (entry.stale_until, entry.expires_at),
            (timestamp(2_000), timestamp(3_000))
        );
    }
}
