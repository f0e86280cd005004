//! The text of `/metrics`, read by the rules of OpenMetrics and nothing beside them: what is not as
//! a scraper wants it is an error that names the line. Must never know which metrics there are.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, bail, ensure};

/// Kinds of families, and what the names of their series end in.
const KINDS: [(&str, &[&str]); 4] = [
    ("counter", &["_total"]),
    ("gauge", &[""]),
    ("histogram", &["_bucket", "_count", "_sum"]),
    ("info", &["_info"]),
];

/// All series of one scrape.
#[derive(Debug, Default)]
pub(super) struct Exposition {
    series: BTreeMap<Series, f64>,
    /// Names of series that never fall.
    rising: BTreeSet<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Series {
    name: String,
    labels: BTreeMap<String, String>,
}

/// What stands above the series of one name.
#[derive(Debug, Default)]
struct Family {
    name: String,
    help: Option<String>,
    kind: Option<&'static (&'static str, &'static [&'static str])>,
}

impl Exposition {
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        let body = text
            .strip_suffix("# EOF\n")
            .context("the text does not end in `# EOF`")?;
        let mut parsed = Self::default();
        let mut family = Family::default();
        let mut families = BTreeSet::new();
        for line in body.lines() {
            let read = match line.strip_prefix("# ") {
                Some(said) => family.read(said, &mut families),
                None => parsed.read(line, &family),
            };
            read.with_context(|| format!("`{line}`"))?;
        }
        parsed.check_buckets()?;
        Ok(parsed)
    }

    /// The sum of the series that have these labels; `None` if there are none.
    pub(super) fn get(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let has = |series: &Series| {
            labels
                .iter()
                .all(|(label, value)| series.labels.get(*label).is_some_and(|is| is == value))
        };
        let found: Vec<f64> = self
            .series
            .iter()
            .filter(|(series, _)| series.name == name && has(series))
            .map(|(_, value)| *value)
            .collect();
        (!found.is_empty()).then(|| found.iter().sum())
    }

    /// That nothing which only rises has fallen or gone since.
    pub(super) fn check_against_earlier(&self, earlier: &Self) -> anyhow::Result<()> {
        for (series, before) in earlier
            .series
            .iter()
            .filter(|(series, _)| earlier.rising.contains(&series.name))
        {
            let now = self
                .series
                .get(series)
                .with_context(|| format!("{series:?} is gone"))?;
            ensure!(now >= before, "{series:?} fell from {before} to {now}");
        }
        Ok(())
    }

    fn read(&mut self, line: &str, family: &Family) -> anyhow::Result<()> {
        let (series, value) = sample(line)?;
        let (kind, endings) = family.kind.context("a series above its type")?;
        ensure!(family.help.is_some(), "a series above its help");
        let ending = series
            .name
            .strip_prefix(&family.name)
            .context("a series of another family")?;
        ensure!(endings.contains(&ending), "no {kind} ends in `{ending}`");
        let value: f64 = value.parse().context("the value is no number")?;
        ensure!(!value.is_nan(), "the value is no number");
        if *kind != "gauge" {
            ensure!(value >= 0.0, "a {kind} below 0");
            self.rising.insert(series.name.clone());
        }
        ensure!(
            self.series.insert(series, value).is_none(),
            "the series is there twice"
        );
        Ok(())
    }

    /// Buckets hold all that the smaller ones do, and the largest holds everything.
    fn check_buckets(&self) -> anyhow::Result<()> {
        let mut histograms: BTreeMap<Series, Vec<(f64, f64)>> = BTreeMap::new();
        for (series, &count) in &self.series {
            let Some(name) = series.name.strip_suffix("_bucket") else {
                continue;
            };
            let mut labels = series.labels.clone();
            let bound = labels
                .remove("le")
                .with_context(|| format!("{series:?} has no bound"))?;
            let counted = Series {
                name: format!("{name}_count"),
                labels,
            };
            histograms
                .entry(counted)
                .or_default()
                .push((bound.parse().context("a bound")?, count));
        }
        for (counted, mut buckets) in histograms {
            buckets.sort_by(|(a, _), (b, _)| a.total_cmp(b));
            ensure!(
                buckets.is_sorted_by(|(_, a), (_, b)| a <= b),
                "{counted:?}: {buckets:?}"
            );
            let all = self
                .series
                .get(&counted)
                .with_context(|| format!("{counted:?} is not there"))?;
            ensure!(
                buckets.last() == Some(&(f64::INFINITY, *all)),
                "{counted:?} is {all}: {buckets:?}"
            );
        }
        Ok(())
    }
}

impl Family {
    /// `HELP name text`, `TYPE name kind` or `UNIT name unit`. All of one family stand together.
    fn read(&mut self, said: &str, families: &mut BTreeSet<String>) -> anyhow::Result<()> {
        let mut words = said.splitn(3, ' ');
        let (Some(what), Some(name), Some(text)) = (words.next(), words.next(), words.next())
        else {
            bail!("words are missing")
        };
        if name != self.name {
            ensure!(is_name(name), "no name");
            ensure!(
                families.insert(name.to_owned()),
                "the family is there twice"
            );
            ensure!(
                self.name.is_empty() || self.help.is_some() && self.kind.is_some(),
                "`{}` has no help or no type",
                self.name
            );
            *self = Self {
                name: name.to_owned(),
                ..Self::default()
            };
        }
        match what {
            "HELP" => ensure!(
                !text.is_empty() && self.help.replace(text.to_owned()).is_none(),
                "no help, or a second one"
            ),
            "TYPE" => {
                let kind = KINDS
                    .iter()
                    .find(|(kind, _)| *kind == text)
                    .context("no such type")?;
                ensure!(self.kind.replace(kind).is_none(), "a second type");
            }
            "UNIT" => ensure!(
                name.ends_with(&format!("_{text}")),
                "the name does not end in its unit"
            ),
            _ => bail!("no such word"),
        }
        Ok(())
    }
}

/// `name value` or `name{label="value",…} value`.
fn sample(line: &str) -> anyhow::Result<(Series, &str)> {
    let end = line.find(['{', ' ']).context("no value")?;
    let (name, mut rest) = line.split_at(end);
    ensure!(is_name(name), "no name");
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, after) = rest.split_once("=\"").context("no label")?;
            ensure!(is_name(label) && !label.contains(':'), "no label name");
            let (value, after) = quoted(after)?;
            ensure!(
                labels.insert(label.to_owned(), value).is_none(),
                "a label twice"
            );
            rest = after.strip_prefix(',').unwrap_or(after);
        }
        rest = &rest[1..];
    }
    let value = rest.strip_prefix(' ').context("no value")?;
    Ok((
        Series {
            name: name.to_owned(),
            labels,
        },
        value,
    ))
}

/// Up to the closing quote, and what comes after it.
fn quoted(text: &str) -> anyhow::Result<(String, &str)> {
    let mut value = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match letters.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, escaped @ ('\\' | '"'))) => value.push(escaped),
                _ => bail!("no such escape"),
            },
            other => value.push(other),
        }
    }
    bail!("a quote is not closed")
}

fn is_name(name: &str) -> bool {
    let is_first = |letter: char| letter.is_ascii_alphabetic() || letter == '_' || letter == ':';
    name.starts_with(is_first)
        && name
            .chars()
            .all(|letter| is_first(letter) || letter.is_ascii_digit())
}

#[test]
fn what_a_scraper_does_not_take_is_not_taken_here() {
    let good = "# HELP a_seconds Time.\n# TYPE a_seconds histogram\n# UNIT a_seconds seconds\na_seconds_sum 1.5\na_seconds_count 2\na_seconds_bucket{le=\"1.0\"} 1\na_seconds_bucket{le=\"+Inf\"} 2\n# HELP b Count.\n# TYPE b counter\nb_total{why=\"a \\\"b\\\"\"} 3\nb_total{why=\"\"} 4\n# EOF\n";
    let parsed = Exposition::parse(good).unwrap();
    assert_eq!(
        (
            parsed.get("b_total", &[]),
            parsed.get("b_total", &[("why", "a \"b\"")])
        ),
        (Some(7.0), Some(3.0))
    );
    assert_eq!(parsed.get("b_total", &[("why", "never")]), None);
    for (word, other) in [
        ("# EOF\n", ""),
        ("b_total{why=\"\"} 4", "b_total{why=\"\"} many"),
        ("b_total{why=\"\"} 4", "b_total{why=\"\"} -4"),
        ("b_total{why=\"\"} 4", "b_total{why=\"a \\\"b\\\"\"} 4"),
        ("b_total{why=\"\"} 4", "b{why=\"\"} 4"),
        ("b_total{why=\"\"} 4", "b_total{wh-y=\"\"} 4"),
        ("# TYPE b counter\n", ""),
        ("# HELP b Count.\n", ""),
        (
            "# HELP b Count.\n# TYPE b counter",
            "# HELP a_seconds Count.\n# TYPE a_seconds counter",
        ),
        ("le=\"1.0\"} 1", "le=\"1.0\"} 3"),
        ("le=\"+Inf\"} 2", "le=\"+Inf\"} 1"),
        ("# UNIT a_seconds seconds", "# UNIT a_seconds bytes"),
    ] {
        assert!(
            good.contains(word) && Exposition::parse(&good.replacen(word, other, 1)).is_err(),
            "`{other}` for `{word}` was taken"
        );
    }
    let fallen = Exposition::parse(&good.replace("} 3", "} 2")).unwrap();
    assert!(
        fallen.check_against_earlier(&parsed).is_err()
            && parsed.check_against_earlier(&fallen).is_ok()
    );
}
