//! The page of pairs: every item's two pictures side by side, with what was found on them.

use std::path::Path;

use super::report::{Outcome, Report};

const STYLE: &str = "body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#222}\
    table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left}\
    .pairs{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0;width:212px;font-size:12px}\
    figure img,figure .none{width:104px;height:104px;image-rendering:pixelated;vertical-align:top}\
    .none{display:inline-block;background:#a33;color:#fff;text-align:center;line-height:104px}\
    .bad{outline:3px solid #c33}figcaption b{color:#c33}";

/// The page as HTML; pictures are linked relative to `folder`.
pub(super) fn html(report: &Report, folder: &Path, unsteered: &Path) -> String {
    let mut text = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\
         <style>{STYLE}</style>\n<h1>{title}</h1>\n<p>Left unsteered, right steered from the same noise. \
         Outlined: the target is still found. Red: withheld.</p>\n{}",
        table(&report.markdown()),
        title = escape(&report.title)
    );
    for (kind, outcomes) in report.by_kind() {
        text.push_str(&format!("<h2>{}</h2>\n<div class=\"pairs\">\n", escape(kind)));
        for outcome in outcomes {
            text.push_str(&figure(report, outcome, folder, unsteered));
        }
        text.push_str("</div>\n");
    }
    text.push_str("</html>\n");
    text
}

fn figure(report: &Report, outcome: &Outcome, folder: &Path, unsteered: &Path) -> String {
    let link = |path: &Path| match path.strip_prefix(folder) {
        Ok(inside) => inside.display().to_string(),
        Err(_) => {
            std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
        }
    };
    let image = |path: &Path, bad: bool| {
        let class = if bad { " class=\"bad\"" } else { "" };
        format!("<img{class} loading=\"lazy\" alt=\"\" src=\"{}\">", escape(&link(path)))
    };
    let left = image(&report.unsteered.picture(unsteered, &outcome.item), false);
    let right = match outcome.steered.withheld {
        true => "<span class=\"none\">withheld</span>".to_owned(),
        false => image(
            &report.steered.picture(folder, &outcome.item),
            outcome.target_steered == Some(true),
        ),
    };
    let found = outcome.found_steered.as_deref().unwrap_or_default().join(", ");
    let note = match (outcome.identical, outcome.steered.corrections) {
        (true, _) => "identical".to_owned(),
        (false, n) => format!("{n} corrections, {} reruns", outcome.steered.reruns),
    };
    format!(
        "<figure>{left} {right}<figcaption>{} (seed {})<br>{note}; found: {}</figcaption></figure>\n",
        escape(&outcome.item.prompt),
        outcome.item.seed,
        escape(&found)
    )
}

/// The Markdown report, of which only tables have a form, as HTML.
fn table(markdown: &str) -> String {
    let mut html = String::new();
    let mut open = false;
    for line in markdown.lines() {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let is_row = line.starts_with('|');
        if is_row && line.starts_with("|---") {
            continue;
        }
        if is_row != open {
            html.push_str(if is_row { "<table>\n" } else { "</table>\n" });
            open = is_row;
        }
        match is_row {
            true => {
                let cells: String =
                    cells.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
                html.push_str(&format!("<tr>{cells}</tr>\n"));
            }
            false if !line.is_empty() => html.push_str(&format!("<p>{}</p>\n", escape(line))),
            false => {}
        }
    }
    if open {
        html.push_str("</table>\n");
    }
    html
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_shown_and_prompts_cannot_break_out() {
        let report = super::super::report::tests::report(&[(Some(true), Some(true)), (None, None)]);
        let page = html(&report, Path::new("out"), Path::new("out"));
        assert!(page.contains("an &lt;axe&gt; &amp; a cat") && !page.contains("<axe>"), "{page}");
        assert!(page.contains("src=\"images/compositional-00000-unsteered.png\""));
        assert!(page.contains("class=\"bad\"") && page.contains(">withheld</span>"));
        assert_eq!(page.matches("<figure>").count(), 2);
        assert_eq!(page.matches("<table>").count(), page.matches("</table>").count());
    }
}
