//! Who is a peer: the cluster's members as this node knows them, and which process of each it has
//! met.
//!
//! ```text
//! this node ── hello: my id, incarnation, session, addresses, last log ──► peer   judges it (membership/judge)
//!           ◄── accepted, and the peer's own ──
//! ```
//! A member is its id and incarnation; a session is one process of it, drawn at its start. A message
//! counts if its sender is a member and this node has met that session: so the copy of a live
//! member, at another address, is nobody. Raft's messages are taken only from peers that have also
//! judged this node: whoever knows that this node's log lost what it had acknowledged says so before
//! this node votes for it.
//!
//! Ids come from a counter and are never used again: an id below it that no member has was removed.

use std::{collections::HashMap, fmt};

use holdfast_proto::peer::{Header, Member, RosterRecord};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Why a message does not count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stranger {
    /// It was a member once.
    Removed,
    /// No member has its id, as far as this node knows: the roster may say more soon.
    Unknown,
    /// A member has its id and another incarnation.
    OtherIncarnation,
    /// A member's process that this node has not met: it says hello and tries again.
    NotMet,
    /// It has not judged this node: it is said hello to, and tries again.
    HasNotJudged,
}

impl fmt::Display for Stranger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Removed => "was removed from the cluster",
            Self::Unknown => "is in no roster",
            Self::OtherIncarnation => "uses a member's id with another incarnation",
            Self::NotMet => "was not met: its process says hello first",
            Self::HasNotJudged => "has not judged this node yet",
        })
    }
}

impl Stranger {
    /// The others are what happens at each start.
    pub(crate) fn is_worth_a_word(&self) -> bool {
        matches!(self, Self::Removed | Self::Unknown | Self::OtherIncarnation)
    }
}

#[derive(Default)]
pub(crate) struct Roster {
    known: Mutex<Known>,
    changed: Notify,
}

#[derive(Default)]
struct Known {
    members: HashMap<u64, Member>,
    /// Of the roster the members are from; 0 before there was one.
    version: u64,
    next_id: u64,
    /// Not in the roster, and members of a Raft group here: about to come, or to be let go.
    in_groups: HashMap<u64, Member>,
    met: HashMap<u64, Met>,
}

#[derive(Default)]
struct Met {
    /// The member's process that this node talks to.
    session: Option<u64>,
    /// The member's process that has judged this node and found it right.
    has_judged: Option<u64>,
    /// What it announced and the roster does not say yet.
    announced: Option<Member>,
    /// Why it must not take part, since it was met last.
    refused: Option<String>,
}

impl Known {
    fn base(&self, id: u64) -> Option<&Member> {
        self.members.get(&id).or_else(|| self.in_groups.get(&id))
    }

    fn member(&self, id: u64) -> Option<&Member> {
        let announced = self.met.get(&id).and_then(|met| met.announced.as_ref());
        let member = self.base(id)?;
        Some(announced.unwrap_or(member))
    }

    fn ids(&self) -> impl Iterator<Item = u64> {
        self.members.keys().chain(self.in_groups.keys()).copied()
    }

    fn is_removed(&self, id: u64) -> bool {
        id != 0 && id < self.next_id && self.base(id).is_none()
    }
}

impl Roster {
    /// Takes what shard 0 has applied. `groups` are the members of the Raft groups here.
    pub(crate) fn set(&self, roster: &RosterRecord, groups: impl IntoIterator<Item = Member>) {
        let mut known = self.known.lock();
        // One that was learned from others may be newer than what is applied here.
        if roster.version >= known.version {
            known.take(roster);
        }
        known.in_groups = groups
            .into_iter()
            .filter(|member| !known.members.contains_key(&member.id))
            .map(|member| (member.id, member))
            .collect();
    }

    /// Members of a cluster whose roster this node does not have yet.
    pub(crate) fn begin_with(&self, members: impl IntoIterator<Item = Member>) {
        let mut known = self.known.lock();
        let members = members.into_iter();
        known.members = members.map(|member| (member.id, member)).collect();
    }

    /// Takes another member's roster if it is newer; whether it was.
    pub(crate) fn learn(&self, roster: &RosterRecord) -> bool {
        let mut known = self.known.lock();
        let is_news = roster.version > known.version && !roster.members.is_empty();
        if is_news {
            known.take(roster);
        }
        is_news
    }

    pub(crate) fn snapshot(&self) -> RosterRecord {
        let known = self.known.lock();
        let mut members: Vec<Member> = known.members.values().cloned().collect();
        members.sort_by_key(|member| member.id);
        RosterRecord {
            next_id: known.next_id,
            version: known.version,
            members,
            ..Default::default()
        }
    }

    pub(crate) fn members(&self) -> Vec<Member> {
        let known = self.known.lock();
        let members = known.members.keys();
        let mut members: Vec<Member> = members
            .filter_map(|&id| known.member(id).cloned())
            .collect();
        members.sort_by_key(|member| member.id);
        members
    }

    /// With the addresses that it announced last.
    pub(crate) fn member(&self, id: u64) -> Option<Member> {
        self.known.lock().member(id).cloned()
    }

    /// It was a member, and no Raft group needs it any more.
    pub(crate) fn is_removed(&self, id: u64) -> bool {
        let known = self.known.lock();
        known.is_removed(id)
    }

    // ---- sessions ----

    /// Whether a message of `from` counts.
    pub(crate) fn check(&self, header: &Header) -> Result<(), Stranger> {
        let known = self.known.lock();
        let Some(member) = known.base(header.from) else {
            return Err(match known.is_removed(header.from) {
                true => Stranger::Removed,
                false => Stranger::Unknown,
            });
        };
        if member.incarnation != header.from_incarnation {
            return Err(Stranger::OtherIncarnation);
        }
        let met = known.met.get(&header.from);
        match met.and_then(|met| met.session) {
            Some(session) if session == header.from_session => Ok(()),
            _ => Err(Stranger::NotMet),
        }
    }

    /// Whether the sender of a message that counts has judged this node.
    pub(crate) fn check_judge(&self, header: &Header) -> Result<(), Stranger> {
        let known = self.known.lock();
        let met = known.met.get(&header.from);
        match met.and_then(|met| met.has_judged) {
            Some(session) if session == header.from_session => Ok(()),
            _ => Err(Stranger::HasNotJudged),
        }
    }

    pub(crate) fn session(&self, id: u64) -> Option<u64> {
        self.known.lock().met.get(&id)?.session
    }

    /// A member's process was found to be it, where it says it is.
    pub(crate) fn meet(&self, member: &Member, session: u64) {
        let mut known = self.known.lock();
        let differs = known.base(member.id).is_some_and(|known| known != member);
        let met = known.met.entry(member.id).or_default();
        met.announced = differs.then(|| member.clone());
        met.refused = None;
        if met.session.replace(session) != Some(session) {
            self.changed.notify_one();
        }
    }

    /// A member must not take part; why.
    pub(crate) fn refuse(&self, id: u64, why: String) {
        let mut known = self.known.lock();
        let met = known.met.entry(id).or_default();
        met.session = None;
        met.refused = Some(why);
    }

    pub(crate) fn refused(&self) -> Vec<(u64, String)> {
        let known = self.known.lock();
        let refused = known.met.iter();
        refused
            .filter_map(|(&id, met)| Some((id, met.refused.clone()?)))
            .collect()
    }

    /// A member's process has judged this node and found it right.
    pub(crate) fn was_judged_by(&self, id: u64, session: u64) {
        self.known.lock().met.entry(id).or_default().has_judged = Some(session);
    }

    /// Members to say hello to: this node has not met them, or they have not judged it.
    pub(crate) fn to_greet(&self, me: u64) -> Vec<Member> {
        let known = self.known.lock();
        let is_strange = |id: &u64| {
            known
                .met
                .get(id)
                .is_none_or(|met| met.session.is_none() || met.session != met.has_judged)
        };
        let strange = known.ids().filter(|id| *id != me && is_strange(id));
        strange.filter_map(|id| known.member(id).cloned()).collect()
    }

    /// A message between this node and a member did not count: both are to say hello again.
    pub(crate) fn forget_judge(&self, id: u64) {
        if let Some(met) = self.known.lock().met.get_mut(&id) {
            met.has_judged = None;
        }
        self.changed.notify_one();
    }

    /// Resolves when somebody is to be greeted at once.
    pub(crate) async fn greeting_is_due(&self) {
        self.changed.notified().await;
    }

    /// Members whose addresses, region or kind are other than the roster says.
    pub(crate) fn announced(&self) -> Vec<Member> {
        let known = self.known.lock();
        let announced = known.met.values().filter_map(|met| met.announced.clone());
        announced
            .filter(|member| known.members.contains_key(&member.id))
            .collect()
    }
}

impl Known {
    fn take(&mut self, roster: &RosterRecord) {
        self.version = roster.version;
        self.next_id = self.next_id.max(roster.next_id);
        self.members = roster
            .members
            .iter()
            .map(|member| (member.id, member.clone()))
            .collect();
        let members = &self.members;
        self.met.retain(|id, met| {
            let member = members.get(id);
            if met.announced.as_ref() == member {
                met.announced = None;
            }
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64) -> Member {
        Member {
            id,
            incarnation: id * 11,
            peer_address: format!("n{id}:7401"),
            ..Default::default()
        }
    }

    fn record(version: u64, next_id: u64, members: &[u64]) -> RosterRecord {
        RosterRecord {
            version,
            next_id,
            members: members.iter().copied().map(member).collect(),
            ..Default::default()
        }
    }

    fn from(id: u64, session: u64) -> Header {
        Header {
            from: id,
            from_incarnation: id * 11,
            from_session: session,
            ..Default::default()
        }
    }

    #[test]
    fn only_a_member_that_was_met_counts() {
        let roster = Roster::default();
        roster.set(&record(1, 4, &[1, 2]), []);
        assert_eq!(roster.check(&from(2, 7)), Err(Stranger::NotMet));
        roster.meet(&member(2), 7);
        assert_eq!(roster.check(&from(2, 7)), Ok(()));
        assert_eq!(roster.check(&from(2, 8)), Err(Stranger::NotMet), "a copy");
        assert_eq!(roster.check(&from(3, 7)), Err(Stranger::Removed));
        assert_eq!(roster.check(&from(4, 7)), Err(Stranger::Unknown));
        let other = Header {
            from_incarnation: 1,
            ..from(2, 7)
        };
        assert_eq!(roster.check(&other), Err(Stranger::OtherIncarnation));
        assert_eq!(roster.check(&from(0, 0)), Err(Stranger::Unknown));
    }

    #[test]
    fn a_member_that_is_told_to_go_counts_until_its_groups_let_it_go() {
        let roster = Roster::default();
        roster.set(&record(1, 4, &[1, 2, 3]), [1, 2, 3].map(member));
        roster.meet(&member(3), 7);
        roster.set(&record(2, 4, &[1, 2]), [1, 2, 3].map(member));
        assert_eq!(roster.check(&from(3, 7)), Ok(()));
        assert_eq!(roster.snapshot().members.len(), 2);
        roster.set(&record(2, 4, &[1, 2]), [1, 2].map(member));
        assert_eq!(roster.check(&from(3, 7)), Err(Stranger::Removed));
    }

    #[test]
    fn raft_is_spoken_with_those_that_judged_this_node() {
        let roster = Roster::default();
        roster.set(&record(1, 3, &[1, 2]), []);
        roster.meet(&member(2), 7);
        assert_eq!(roster.check_judge(&from(2, 7)), Err(Stranger::HasNotJudged));
        assert_eq!(roster.to_greet(1).len(), 1);
        roster.was_judged_by(2, 7);
        assert_eq!(roster.check_judge(&from(2, 7)), Ok(()));
        assert!(roster.to_greet(1).is_empty());
        // It started again, and knows nothing of this node.
        roster.meet(&member(2), 8);
        assert_eq!(roster.check_judge(&from(2, 8)), Err(Stranger::HasNotJudged));
        assert_eq!(roster.to_greet(1).len(), 1);
    }

    #[test]
    fn a_newer_roster_is_learned_and_not_undone_by_an_older_one() {
        let roster = Roster::default();
        roster.begin_with([member(1)]);
        assert!(roster.learn(&record(5, 5, &[1, 2, 4])));
        assert!(!roster.learn(&record(4, 4, &[1, 2])));
        roster.set(&record(3, 3, &[1, 2]), []);
        assert!(roster.member(4).is_some());
        assert!(roster.is_removed(3));
        assert!(!roster.is_removed(5));
    }

    #[test]
    fn an_announced_address_counts_before_the_roster_has_it() {
        let roster = Roster::default();
        roster.set(&record(1, 3, &[1, 2]), []);
        let moved = Member {
            peer_address: "elsewhere:1".into(),
            ..member(2)
        };
        roster.meet(&moved, 7);
        assert_eq!(roster.member(2), Some(moved.clone()));
        assert_eq!(roster.announced(), std::slice::from_ref(&moved));
        let mut after = record(2, 3, &[1, 2]);
        after.members[1] = moved.clone();
        roster.set(&after, []);
        assert!(roster.announced().is_empty());
        assert_eq!(roster.member(2), Some(moved));
    }
}
