import ast
import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_routings import known_truth, routing

from coterie.core.cost import Parameters
from coterie.core.errors import DataError
from coterie.inspect import ReportData, Trace, analyse, write_report
from coterie.inspect.plots import balance, positions, relations, run, style
from coterie.inspect.plots import routing as maps

EVIL = "<script>alert(1)</script>&\"'"


class Page(HTMLParser):
    """Checks that tags close in order and collects what tests ask about."""

    VOID = frozenset({"meta", "img", "source", "br", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.images = [], [], [], [], []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[key] for key in ("href", "src", "srcset") if key in values]
        if tag == "img":
            self.images.append(values)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


@pytest.fixture(scope="module")
def trace():
    rng = torch.Generator().manual_seed(0)
    out = Trace(grid=(4, 4))
    for _ in range(5):
        out.add(known_truth(rng))
    for step in range(6):
        noise = torch.full((20,), 1 - step / 6)
        out.add_step(step, known_truth(torch.Generator().manual_seed(1), 20, noise=noise))
    return out


@pytest.fixture(scope="module")
def report(trace, tmp_path_factory):
    data = ReportData(
        title="Experts on digits",
        recipe="dit-moe/tiny",
        trace=trace,
        loss_bins=[{"bin": i, "lo": i / 5, "hi": (i + 1) / 5, "loss": 0.1 * (i + 1), "count": 40}
                   for i in range(5)],
        curve=[{"step": i + 1, "loss": 1 / (i + 1), "machine": {"memory_mb": 1.0 + i}}
               for i in range(30)],
        samples=np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4, 1),
        labels=[0, 1, 2, 3, 4, -1],
        class_names=[f"digit {i}" for i in range(10)],
        metrics={"extractor": "small", "n": 60, "frechet": {"value": 12.5, "floor": 1.25}},
        parameters=Parameters(total=1_900_000, active=812_000),
        config={"model": {"depth": 4}},
        citation="@article{somebody2024}",
        hardware="2 CPU cores",
        commit="0123456789abcdef",
        step=1500,
    )  # fmt: skip
    return write_report(tmp_path_factory.mktemp("report"), data)


def test_page_is_well_formed_self_contained_and_described(report):
    text = report.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    for link in page.links:
        assert link.startswith("data:image/png;base64,") or link[1:] in page.ids
    assert not re.search(r"https?://|url\(|@import", text)
    assert all(len(image["alt"]) > 30 for image in page.images)
    assert text.count("<figcaption>") == len(page.images) == text.count("prefers-color-scheme") - 1
    assert page.tags.count("table") == len(re.findall(r'<table aria-labelledby="t', text))


def test_page_says_what_is_known_of_every_layer(report):
    text = " ".join(Page(report.read_text(encoding="utf-8")).text.split())
    assert "Alarm Layer 3: expert 7 is dead" in text
    assert "In layer 0 the choice of expert tells 3.3" in text
    said = "By Frechet distance (lower is better) the samples score 12.5, real held-out data 1.25"
    assert said in text
    for fact in ("dit-moe/tiny", "1.9 M", "812 k", "1,500", "0123456789ab", "2 CPU cores"):
        assert fact in text
    assert "extractor: small" in text and "@article{somebody2024}" in text
    assert "Not shown. Experts that work together: no row uses two" in text


def test_every_picture_is_a_file_and_is_embedded_light_and_dark(report):
    text = report.read_text(encoding="utf-8")
    names = {path.stem for path in report.parent.glob("*.png")}
    assert names == {
        "information", "expert_by_noise", "expert_by_class", "expert_by_position", "load",
        "balance_over_noise", "expert_by_step", "step_consistency", "task_affinity",
        "loss_by_noise", "samples", "training", "adjacent_layers", "gates_by_class", "left_out",
    }  # fmt: skip
    for name in names:
        figure = text.split(f'<figure class="card" id="{name}">')[1].split("</figure>")[0]
        dark, light = re.findall(r'base64,([^"]+)"', figure)
        assert base64.b64decode(light) == (report.parent / f"{name}.png").read_bytes()
        corners = [Image.open(io.BytesIO(base64.b64decode(b))).getpixel((0, 0)) for b in
                   (light, dark)]  # fmt: skip
        assert corners == [(255, 255, 255), (0x17, 0x1D, 0x26)]


def test_numbers_are_complete_sorted_and_finite(report, trace):
    text = (report.parent / "report.json").read_text(encoding="utf-8")
    data = json.loads(text, parse_constant=pytest.fail)
    assert list(data) == sorted(data) and len(text.splitlines()) < 3000
    assert data["schema_version"] == 1
    first, _, _, last = data["routing"]["routers"]
    assert first["information"]["noise"]["bits"] == pytest.approx(np.log2(10), abs=0.05)
    assert first["information"]["class"]["measurable"] is False
    assert last["dead"] == [7]
    counts = np.array(first["counts"]["noise"]["conditional"]["choices"])
    assert (counts == trace.routers[0].noise.counts[0]).all()
    unconditional = np.array(first["counts"]["total"]["unconditional"]["choices"])
    assert (unconditional[0] == trace.routers[0].counts[1]).all()
    steps = data["routing"]["steps"]
    assert steps[1]["overlap"] == [None, 1, 1, 1, 1, 1]
    assert steps[1]["chance"] == pytest.approx(0.109375)  # (6 * 4 + 4 * 1) / 256
    assert data["metrics"]["frechet"] == {"value": 12.5, "floor": 1.25}
    assert data["training"]["loss"]["step"][-1] == 30
    assert "machine/memory_mb" not in data["training"]
    assert data["parameters"] == {"total": 1900000, "active": 812000}


def test_a_dense_model_has_a_report_too_and_the_same_one_twice(tmp_path):
    data = ReportData(title="Dense", loss_bins=[{"bin": 0, "lo": 0, "hi": 1, "loss": 0.5}])
    first = write_report(tmp_path / "a", data)
    second = write_report(tmp_path / "deep" / "b", data)
    page = Page(first.read_text(encoding="utf-8"))
    assert "This model is dense" in page.text
    assert "Who does what in this model" in page.text and "specialisation" not in page.ids
    for name in ("index.html", "report.json", "loss_by_noise.png"):
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()


def test_a_text_model_gets_position_curves_text_samples_and_reasons(tmp_path):
    rng = torch.Generator().manual_seed(0)
    ids = torch.rand(8 * 100, 4, generator=rng).argsort(1)[:, :2]
    texts_trace = Trace()
    texts_trace.add([routing(ids, 4, (8, 100))])
    data = ReportData(
        title="Text", trace=texts_trace, samples=["To be <or> not", "x" * 5000] + ["more"] * 20
    )
    page = Page(write_report(tmp_path, data).read_text(encoding="utf-8"))
    assert "To be <or> not" in page.text
    assert "[...]" in page.text and "The first 12 of 22" in page.text
    assert "Experts by noise: no noise level was recorded" in page.text
    assert "Experts by class: no class labels were recorded" in page.text
    assert {"expert_by_position", "coactivation", "load"} <= set(page.ids)
    assert "expert_by_noise" not in page.ids and "training" not in page.ids


def test_user_strings_are_escaped_everywhere(tmp_path):
    evil = Trace()
    evil.add([routing(torch.arange(40) % 2, 2, (40, 1), slot=EVIL, label=torch.arange(40) % 2)])
    evil.add([routing(torch.arange(40) % 2, 2, (40, 1), slot="$\\frac{", layer=1)])
    data = ReportData(
        title=EVIL,
        recipe=EVIL,
        trace=evil,
        curve=[{"step": 1, EVIL: 1.0}, {"step": 2, EVIL: 2.0}],
        samples=[EVIL],
        class_names=["$x_{", EVIL],
        metrics={EVIL: {"value": 1.0, "floor": 0.5}, "extractor": EVIL},
        config={EVIL: EVIL},
        citation=EVIL,
        hardware=EVIL,
        commit=EVIL,
    )
    text = write_report(tmp_path, data).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<script>alert(1)" in Page(text).text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": np.zeros((2, 4, 4, 3), np.float32)}, "samples"),
        ({"samples": np.zeros((2, 4, 4), np.uint8)}, "samples"),
        ({"samples": [1, 2]}, "samples"),
        ({"samples": ["a", "b"], "labels": [1]}, "labels"),
        ({"loss_bins": [{"bin": 0, "lo": 0.0, "loss": 1.0}]}, "loss_bins.0: hi missing"),
    ],
)
def test_bad_data_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        write_report(tmp_path / "out", ReportData(title="x", **change))
    assert not (tmp_path / "out").exists()


def test_values_that_are_missing_or_not_finite_are_dashes_and_nulls(tmp_path):
    bins = [{"bin": i, "lo": i / 2, "hi": i / 2 + 0.5, "loss": loss, "count": 0}
            for i, loss in enumerate([None, float("nan")])]  # fmt: skip
    data = ReportData(
        title="x",
        loss_bins=bins,
        metrics={"fid": float("inf"), "fid_floor": 1.0},
        curve=[{"step": 1, "loss": None}, {"step": 2, "loss": float("nan")}],
    )
    index = write_report(tmp_path, data)
    numbers = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert numbers["loss_by_noise"][1]["loss"] is None and numbers["metrics"]["fid"] is None
    assert "–" in Page(index.read_text(encoding="utf-8")).text
    assert not list(tmp_path.glob("*.png"))


def large_trace(layers, num_experts, num_classes=100):
    """Many experts choose by noise level, in many layers."""
    out = Trace(grid=(2, 2))
    rng = torch.Generator().manual_seed(0)
    noise = torch.rand(50, generator=rng)
    label = torch.arange(50) * 2 % num_classes
    ids = (noise * num_experts).long().repeat_interleave(4)
    record = routing(ids, num_experts, (50, 4), noise=noise, label=label)
    out.add([record.replace(layer=layer) for layer in range(layers)])
    return out


def test_many_layers_experts_and_classes_are_capped_and_the_caption_says_so():
    big = large_trace(28, 78)
    items = analyse(big)
    names = [item.name for item in items]
    noise = maps.plot_noise(big.routers, names)
    classes = maps.plot_classes(big.routers, names, [])
    placed = positions.plot_positions(big.routers, names, big.grid)
    load = balance.plot_load(items, big.routers)
    for plot in (noise, classes, placed, load):
        assert "12 of 28 layers are drawn" in plot.caption
    assert "40 of 99 classes" in classes.caption
    assert "The 16 busiest experts" in placed.caption
    figure = noise.draw()
    assert len([ax for ax in figure.axes if ax.images]) == 12
    assert style.pick(28) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]
    height = figure.get_figheight() * style.CSS_PIXELS_PER_INCH
    assert height < 1200


def test_long_sequences_are_pooled_to_readable_columns():
    out = Trace()
    out.add([routing(torch.arange(2000) // 500 % 4, 4, (2, 1000))])
    (router,) = out.routers
    plot = positions.plot_positions([router], ["0"], None)
    (image,) = [ax.images[0] for ax in plot.draw().axes if ax.images]
    assert image.get_array().shape == (4, 64)
    assert np.asarray(image.get_array().sum(0)) == pytest.approx(np.ones(64))


def test_maps_put_each_expert_where_its_tokens_are():
    out = Trace(grid=(2, 3))
    out.add([routing(torch.arange(6).repeat(30), 6, (30, 6))])
    plot = positions.plot_positions(out.routers, ["0"], out.grid)
    image = next(ax.images[0] for ax in plot.draw().axes if ax.images)
    canvas = np.ma.filled(image.get_array(), np.nan)
    tiles = [canvas[:, start : start + 12] for start in range(0, 6 * 14, 14)]
    for expert, tile in enumerate(tiles):
        expected = np.zeros(6)
        expected[expert] = 1
        assert (tile[::4, ::4] == expected.reshape(2, 3)).all()


def test_reserved_experts_of_unconditional_rows_are_not_called_dead():
    label = torch.tensor([0, 1] * 20 + [-1] * 10)
    ids = torch.tensor([0, 1] * 20 + [2] * 10)
    mask = label >= 0
    record = routing(ids, 3, (50, 1), label=label, mask=mask, num_reserved=1)
    out = Trace()
    out.add([record])
    out.add_step(0, [record])
    (item,) = analyse(out)
    assert item.num_experts == 2 and item.dead == () and item.entropy == 1.0
    assert out.steps[item.place].counts.shape == (1, 2)


def test_prototype_and_variable_choice_pictures_exist_where_they_apply():
    prototypes = torch.eye(3)
    ids = torch.tensor([[0, 1], [0, 3], [2, 3]] * 20)
    out = Trace()
    out.add([routing(ids, 3, (60, 1), prototypes=prototypes)])
    plot = balance.plot_prototypes(out.routers, ["0"])
    assert np.asarray(plot.draw().axes[0].images[0].get_array()) == pytest.approx(np.eye(3))
    choices = balance.plot_choices(out.routers, ["0"])
    shares = choices.draw().axes[0].images[0].get_array()
    assert np.asarray(shares) == pytest.approx(np.array([[0, 2 / 3, 1 / 3]]))


def test_task_affinity_prefers_the_routers_own_tables():
    table = torch.zeros(100, 4)
    table[:50, :2] = 0.5
    table[50:, 2:] = 0.5
    ids = torch.tensor([[0, 1], [2, 3]])
    noise = torch.tensor([0.1, 0.9])
    out = Trace()
    out.add([routing(ids, 4, (2, 8), unit="sample", table=table, noise=noise)])
    usage, source = balance.noise_usage(out.routers)
    assert usage.shape == (100, 4) and "tables" in source
    matrix = balance.plot_affinity(out.routers).draw().axes[0].images[0].get_array()
    assert np.asarray(matrix) == pytest.approx(np.kron(np.eye(2), np.ones((50, 50))))


def test_information_bars_below_chance_are_pale_and_the_legend_has_their_colours(trace):
    ax = maps.plot_information(analyse(trace)).draw().axes[0]
    strong = [bar for bar in ax.patches if bar.get_height() > 3]
    weak = [bar for bar in ax.patches if bar.get_height() < 1]
    assert len(strong) == 3 and len(weak) == 9
    assert all(bar.get_alpha() == 1.0 for bar in strong)
    assert all(bar.get_alpha() == 0.3 for bar in weak)
    colours = {patch.get_facecolor()[:3] for patch in ax.get_legend().get_patches()}
    assert colours == {bar.get_facecolor()[:3] for bar in strong}


def test_curves_of_layers_share_a_panel():
    groups = run.curve_groups(["loss", "aux/balance/layer0", "aux/balance/layer1",
                               "experts/ffn/layer0/experts"])  # fmt: skip
    assert groups == {
        "loss": ["loss"],
        "aux/balance": ["aux/balance/layer0", "aux/balance/layer1"],
    }
    figure = run.plot_curves(
        [{"step": i, "loss": 10.0**-i, "aux": {"b/layer0": 1.0, "b/layer1": 2.0}} for i in range(9)]
    ).draw()
    assert [len(ax.lines) for ax in figure.axes] == [1, 2]
    assert figure.axes[0].get_yscale() == "log"


def test_points_are_scattered_and_colour_images_keep_their_colours():
    scatter = run.plot_points(np.zeros((5, 2)), [0, 1, 2, 3, 4]).draw()
    assert len(scatter.axes[0].collections[0].get_offsets()) == 5
    red = np.zeros((1, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    picture = style.render(run.plot_samples(red, None, []))
    image = np.asarray(Image.open(io.BytesIO(picture.dark)).convert("RGB"))
    middle = image[image.shape[0] // 2, image.shape[1] // 2]
    assert middle.tolist() == [255, 0, 0]


def test_wide_pictures_are_fewer_and_larger():
    square, wide = (np.zeros((64, 8, width, 3), np.uint8) for width in (8, 24))
    tiles = [run.plot_samples(images, None, []).draw().axes[0].images for images in (square, wide)]
    assert [len(found) for found in tiles] == [60, 20]
    tops = [len({image.get_extent()[3] for image in found}) for found in tiles]
    assert tops == [6, 7]


def test_long_titles_of_panels_are_broken_and_have_room():
    def height(name):
        lift = np.ones((4, 4))
        told = SimpleNamespace(corrected=0.25)
        pair = SimpleNamespace(kind="layer", lift=lift, information=told, name=name)
        figure = relations.plot_adjacent([pair]).draw()
        return figure.axes[0].get_title(), figure.get_size_inches()[1]

    short, long = height("0 to 1"), height("up.0.0.conv2 to up.0.1.conv2")
    assert short[0] == "0 to 1: 0.25 bits"
    assert long[0] == "up.0.0.conv2\nto up.0.1.conv2\n0.25 bits" and long[1] > short[1] + 0.3


def test_no_module_imports_plotting_before_it_draws():
    for path in Path(style.__file__).parents[1].rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in getattr(node, "names", [])]
            names.append(getattr(node, "module", None) or "")
            assert not any(name.startswith(("matplotlib", "PIL")) for name in names), path
