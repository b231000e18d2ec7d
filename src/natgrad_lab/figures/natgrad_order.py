"""Figure 3 of Pascanu & Bengio (2013) [NATGRAD], from a record."""

from typing import Any

from natgrad_lab.figures.drawing import COLOURS, MARKERS, Drawing, canvas, draws
from natgrad_lab.recipes.natgrad_order import MSGD, NATURAL
from natgrad_lab.recipes.run import Record


@draws("natgrad-fig3")
def figure_3(record: Record) -> Drawing:
    """The variance of the outputs against the segment that was drawn anew."""
    segments = range(1, record.configuration["segments"] + 1)
    figure, axes = canvas(1, 1, width=7, height=4)
    one: Any = axes[0][0]
    curves = {}
    for i, method in enumerate((MSGD, NATURAL)):
        curves[method] = [record.results[f"{method}, segment {s}"]["variance"] for s in segments]
        one.plot(segments, curves[method], color=COLOURS[i], marker=MARKERS[i], markersize=5, label=method)
    one.set(ylim=(0, None), xlabel="segment of the first half that was drawn anew", ylabel="variance of the outputs")
    one.set_xticks(list(segments))
    one.legend(fontsize=10, frameon=False)
    equal = record.results["equal validation error"]
    errors = {method: _errors(record, method) for method in curves}
    rows = [
        (f"validation error, {method}", "49.8 %", f"{sum(found) / len(found):.1f} %")
        for method, found in errors.items()
    ]
    rows.append(("learning rate of MSGD for it", "0.1", f"{equal['lr']:.2g}"))
    plain, natural = curves[MSGD], curves[NATURAL]
    for method, values in curves.items():
        rows.append((f"first segment's variance / last's, {method}", "above 1", f"{values[0] / values[-1]:.2f}"))
    smaller = sum(n < p for n, p in zip(natural, plain, strict=True))
    rows.append(("segments where natural gradient's is smaller", "all 10", f"{smaller} of {len(plain)}"))
    rows.append(("variance of natural gradient / MSGD, mean", "below 1", f"{sum(natural) / sum(plain):.2f}"))
    rows.append(("natural's first / MSGD's last", "about 1", f"{natural[0] / plain[-1]:.2f}"))
    return Drawing({"": figure}, rows)


def _errors(record: Record, method: str) -> list[float]:
    """Validation errors of all networks that a method trained."""
    return [e for part, found in record.results.items() if part.startswith(f"{method}, ") for e in found["errors"]]
