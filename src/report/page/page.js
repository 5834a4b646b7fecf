// Values under the pointer, at the same step in every chart. A point is [step, place from above in
// percent, text]; arrow keys move the cursor of a chart that has the focus, and the values there are said
// to those who do not see it. A chart with a logarithmic
// scale has the places on it, too, from which its lines are drawn when it is chosen.
(() => {
  const add = (parent, name) => {
    const element = parent.appendChild(document.createElement("div"));
    element.className = name;
    element.hidden = true;
    return element;
  };

  const charts = [...document.querySelectorAll(".chart")].map((figure) => {
    const area = figure.querySelector(".area");
    const { points, log } = JSON.parse(figure.querySelector("script").textContent);
    const groups = figure.querySelectorAll("svg g");
    const items = [...figure.querySelectorAll(".legend li")];
    const lines = items.map((item, index) => ({
      points: points[index],
      log: log[index],
      paths: [...groups[index].querySelectorAll("path")],
      value: item.querySelector("b"),
      last: item.querySelector("b").textContent,
      dot: add(area, "point " + item.className),
    }));
    const cursor = add(area, "cursor");
    const label = cursor.appendChild(document.createElement("span"));
    const said = figure.querySelector(".unseen");
    return { figure, area, lines, items, cursor, label, said, lastStep: Number(figure.dataset.lastStep) };
  });

  // Index of the last point at or before the step; -1 if there is none.
  const before = (points, step) => {
    let low = 0, high = points.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle][0] <= step) low = middle + 1; else high = middle;
    }
    return low - 1;
  };

  const nearest = (points, step) => {
    const index = Math.max(before(points, step), 0), next = points[index + 1];
    return next && next[0] - step < step - points[index][0] ? index + 1 : index;
  };

  const place = (chart, step) => (100 * step) / chart.lastStep + "%";

  const show = (step) => {
    for (const chart of charts) {
      chart.cursor.hidden = false;
      chart.cursor.style.left = place(chart, step);
      chart.label.textContent = "step " + step.toLocaleString("en");
      for (const line of chart.lines) {
        const index = before(line.points, step), point = line.points[index];
        const at = point && (chart.log ? line.log[index] : point[1]);
        line.dot.hidden = !point || at === null;
        line.value.textContent = point ? point[2] : "–";
        if (!point) continue;
        line.dot.style.left = place(chart, point[0]);
        line.dot.style.top = at + "%";
      }
    }
  };

  const say = (chart) => {
    const values = chart.items.map((item) => item.textContent.trim());
    chart.said.textContent = chart.label.textContent + ": " + values.join(", ");
  };

  const clear = () => {
    for (const chart of charts) {
      chart.cursor.hidden = true;
      for (const line of chart.lines) {
        line.dot.hidden = true;
        line.value.textContent = line.last;
      }
    }
  };

  // The paths of a line on the logarithmic scale: the line itself, and dots if it has any.
  const logarithmic = (chart, line) => {
    const places = line.points
      .map((point, index) => [(100 * point[0]) / chart.lastStep, line.log[index]])
      .filter(([, down]) => down !== null)
      .map(([across, down]) => across.toFixed(2) + " " + down);
    return ["M" + places.join("L"), places.map((place) => "M" + place + "h0").join("")];
  };

  const setScale = (chart, log) => {
    chart.log = log;
    chart.figure.classList.toggle("on-log", log);
    for (const line of chart.lines) {
      line.linear ??= line.paths.map((path) => path.getAttribute("d"));
      const drawn = log ? logarithmic(chart, line) : line.linear;
      line.paths.forEach((path, index) => path.setAttribute("d", drawn[index]));
    }
    clear();
  };

  for (const chart of charts) {
    const scale = chart.figure.querySelector(".scale");
    if (scale) {
      const buttons = [...scale.querySelectorAll("button")];
      scale.hidden = false;
      buttons.forEach((button, chosen) => button.addEventListener("click", () => {
        buttons.forEach((each, index) => each.setAttribute("aria-pressed", index === chosen));
        setScale(chart, chosen === 1);
      }));
    }
    const plot = chart.figure.querySelector(".plot"), points = chart.lines[0].points;
    let index = points.length - 1;
    const select = (next) => {
      index = Math.min(Math.max(next, 0), points.length - 1);
      show(points[index][0]);
    };
    const follow = (event) => {
      const box = chart.area.getBoundingClientRect();
      select(nearest(points, ((event.clientX - box.left) / box.width) * chart.lastStep));
    };
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", clear);
    plot.addEventListener("blur", clear);
    plot.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      select(index + move);
      say(chart);
    });
  }
})();
