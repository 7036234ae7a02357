// Command fetch prints a page over HTTP, with limits on time and size: the
// browserless user of the work domain that stands in for Windows.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

const usage = `usage: fetch [-timeout 10s] [-max 1048576] URL

fetch prints the page at URL to standard output. -timeout bounds the whole
exchange, -max the size of the page in bytes.

Exit status: 0 page printed, 1 no answer, cut short or over -max,
2 wrong usage, 3 the server answered with a status other than 2xx.
`

// errStatus is an answer other than 2xx.
var errStatus = errors.New("refused by the server")

func main() {
	timeout := flag.Duration("timeout", 10*time.Second, "bound of the whole exchange")
	limit := flag.Int64("max", 1<<20, "bound of the page in bytes")
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	flag.Parse()
	if flag.NArg() != 1 || *timeout <= 0 || *limit <= 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, cancel := context.WithTimeout(context.Background(), *timeout)
	defer cancel()
	if err := fetch(ctx, flag.Arg(0), *limit, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "fetch:", err)
		if errors.Is(err, errStatus) {
			os.Exit(3)
		}
		os.Exit(1)
	}
}

// fetch copies the page at url to w.
func fetch(ctx context.Context, url string, limit int64, w io.Writer) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	n, err := io.Copy(w, io.LimitReader(resp.Body, limit))
	if err != nil {
		return fmt.Errorf("after %d bytes: %w", n, err)
	}
	if n == limit {
		if m, _ := resp.Body.Read(make([]byte, 1)); m > 0 {
			return fmt.Errorf("page is larger than %d bytes; give a larger -max", limit)
		}
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%w: %s", errStatus, resp.Status)
	}
	return nil
}
