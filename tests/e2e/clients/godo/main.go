// Drives godo from a test: one operation a line on stdin, one line with what it gave on stdout.
//
// A line is a JSON array: the operation's name, then its arguments as strings. The address of the API is the
// only argument of the program, the token is in DIGITALOCEAN_TOKEN. What an operation gives is what godo's
// user gets: the parsed result, `Response.Rate`, the header Cache-Status; or the type and fields of the error.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"

	"github.com/digitalocean/godo"
	"golang.org/x/oauth2"
)

type said struct {
	Gave  any        `json:"gave,omitempty"`
	Rate  *godo.Rate `json:"rate,omitempty"`
	Cache string     `json:"cache,omitempty"`
	Error *failure   `json:"error,omitempty"`
}

type failure struct {
	Type      string `json:"type"`
	Status    int    `json:"status"`
	Message   string `json:"message"`
	RequestID string `json:"request_id"`
}

type operation func(context.Context, *godo.Client, []string) (any, *godo.Response, error)

var operations = map[string]operation{
	"UserAgent": func(_ context.Context, c *godo.Client, _ []string) (any, *godo.Response, error) {
		return c.UserAgent, nil, nil
	},
	"Snapshots.List": func(ctx context.Context, c *godo.Client, args []string) (any, *godo.Response, error) {
		return results(c.Snapshots.List(ctx, page(args)))
	},
	"Snapshots.ListVolume": func(ctx context.Context, c *godo.Client, args []string) (any, *godo.Response, error) {
		return results(c.Snapshots.ListVolume(ctx, page(args)))
	},
	"Snapshots.ListDroplet": func(ctx context.Context, c *godo.Client, args []string) (any, *godo.Response, error) {
		return results(c.Snapshots.ListDroplet(ctx, page(args)))
	},
	"Snapshots.Get": func(ctx context.Context, c *godo.Client, args []string) (any, *godo.Response, error) {
		return results(c.Snapshots.Get(ctx, args[0]))
	},
	"Snapshots.Delete": func(ctx context.Context, c *godo.Client, args []string) (any, *godo.Response, error) {
		response, err := c.Snapshots.Delete(ctx, args[0])
		return nil, response, err
	},
	"Storage.ListSnapshots": func(ctx context.Context, c *godo.Client, args []string) (any, *godo.Response, error) {
		return results(c.Storage.ListSnapshots(ctx, args[0], page(args[1:])))
	},
	"Storage.GetSnapshot": func(ctx context.Context, c *godo.Client, args []string) (any, *godo.Response, error) {
		return results(c.Storage.GetSnapshot(ctx, args[0]))
	},
	"Storage.CreateSnapshot": func(ctx context.Context, c *godo.Client, args []string) (any, *godo.Response, error) {
		return results(c.Storage.CreateSnapshot(ctx, &godo.SnapshotCreateRequest{VolumeID: args[0], Name: args[1]}))
	},
	"Storage.DeleteSnapshot": func(ctx context.Context, c *godo.Client, args []string) (any, *godo.Response, error) {
		response, err := c.Storage.DeleteSnapshot(ctx, args[0])
		return nil, response, err
	},
	"Droplets.Snapshots": func(ctx context.Context, c *godo.Client, args []string) (any, *godo.Response, error) {
		return results(c.Droplets.Snapshots(ctx, number(args[0]), page(args[1:])))
	},
	// What this version has no method for, by the request that later versions' methods make.
	"Do": func(ctx context.Context, c *godo.Client, args []string) (any, *godo.Response, error) {
		request, err := c.NewRequest(ctx, http.MethodGet, args[0], nil)
		if err != nil {
			return nil, nil, err
		}
		var document map[string]any
		response, err := c.Do(ctx, request, &document)
		return document, response, err
	},
	// All pages, as godo's own example follows them.
	"Pages": func(ctx context.Context, c *godo.Client, args []string) (any, *godo.Response, error) {
		ids := []string{}
		options := &godo.ListOptions{PerPage: number(args[0])}
		for {
			snapshots, response, err := c.Snapshots.List(ctx, options)
			if err != nil {
				return nil, response, err
			}
			for _, snapshot := range snapshots {
				ids = append(ids, snapshot.ID)
			}
			if response.Links == nil || response.Links.IsLastPage() {
				return ids, response, nil
			}
			current, err := response.Links.CurrentPage()
			if err != nil {
				return nil, response, err
			}
			options.Page = current + 1
		}
	},
}

func main() {
	PROXY, TOKEN, ctx := os.Args[1], os.Getenv("DIGITALOCEAN_TOKEN"), context.Background()
	source := oauth2.StaticTokenSource(&oauth2.Token{AccessToken: TOKEN})
	client, err := godo.New(oauth2.NewClient(ctx, source), godo.SetBaseURL(PROXY+"/"))
	if err != nil {
		panic(err)
	}
	out := json.NewEncoder(os.Stdout)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		var words []string
		if err := json.Unmarshal(lines.Bytes(), &words); err != nil {
			panic(err)
		}
		if err := out.Encode(do(ctx, client, words)); err != nil {
			panic(err)
		}
	}
}

func do(ctx context.Context, client *godo.Client, words []string) said {
	gave, response, err := operations[words[0]](ctx, client, words[1:])
	answer := said{Gave: gave}
	if response != nil {
		answer.Rate, answer.Cache = &response.Rate, response.Header.Get("Cache-Status")
	}
	if err != nil {
		answer.Gave, answer.Error = nil, &failure{Type: fmt.Sprintf("%T", err), Message: err.Error()}
		var refused *godo.ErrorResponse
		if errors.As(err, &refused) {
			answer.Error.Status, answer.Error.Message = refused.Response.StatusCode, refused.Message
			answer.Error.RequestID = refused.RequestID
		}
	}
	return answer
}

func results[T any](gave T, response *godo.Response, err error) (any, *godo.Response, error) {
	return gave, response, err
}

func page(args []string) *godo.ListOptions {
	if len(args) == 0 {
		return nil
	}
	return &godo.ListOptions{Page: number(args[0]), PerPage: number(args[1])}
}

func number(word string) int {
	value, err := strconv.Atoi(word)
	if err != nil {
		panic(err)
	}
	return value
}
